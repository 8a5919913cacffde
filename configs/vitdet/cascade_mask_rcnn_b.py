"""Cascade Mask R-CNN with ViTDet-B on COCO."""

from ..common.cascade import roi_heads as _roi_heads
from .mask_rcnn_b import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.roi_heads = _roi_heads

train.init_checkpoint = "detectron2://ViTDet/COCO/cascade_mask_rcnn_vitdet_b/f325358525/model_final_435fa9.pkl"
