"""Cascade Mask R-CNN with ViTDet-L on COCO."""

from ..common.cascade import roi_heads as _roi_heads
from .mask_rcnn_l import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.roi_heads = _roi_heads

train.init_checkpoint = "detectron2://ViTDet/COCO/cascade_mask_rcnn_vitdet_l/f328021305/model_final_1a9f28.pkl"
