"""Mask2Former with Swin-L (ImageNet-21k, 384) on COCO panoptic."""

from ..common.mask2former import swin_l
from .coco_panoptic_swin_t import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.backbone.update(swin_l)
model.num_queries = 200

plan.start, plan.stop, plan.reducer.grid = 10, 22, [8, 8]

train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/maskformer/mask2former/"
    "coco/panoptic/maskformer2_swin_large_IN21k_384_bs16_100ep/model_final_f07440.pkl"
)
# 100 epochs.
train.max_iter = 737500
lr_multiplier.update(milestones=[655556, 710184], num_updates=train.max_iter)
