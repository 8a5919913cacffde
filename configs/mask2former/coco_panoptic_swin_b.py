"""Mask2Former with Swin-B (ImageNet-21k, 384) on COCO panoptic."""

from ..common.mask2former import swin_b
from .coco_panoptic_swin_t import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.backbone.update(swin_b)

plan.start, plan.stop, plan.reducer.grid = 10, 22, [8, 8]

train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/maskformer/mask2former/"
    "coco/panoptic/maskformer2_swin_base_IN21k_384_bs16_50ep/model_final_54b88a.pkl"
)
