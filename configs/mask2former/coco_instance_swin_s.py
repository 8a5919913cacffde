"""Mask2Former with Swin-S on COCO instances."""

from ..common.mask2former import swin_s
from .coco_instance_swin_t import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.backbone.update(swin_s)

plan.start, plan.stop = 12, 22

train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/maskformer/mask2former/"
    "coco/instance/maskformer2_swin_small_bs16_50ep/model_final_1e7f22.pkl"
)
