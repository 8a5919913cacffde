"""Mask2Former with Swin-T on COCO instances."""

from ..common.coco import dataloader
from .coco_panoptic_swin_t import evaluation, lr_multiplier, model, optimizer, plan, search, train

model.update(num_classes=80, things=None, panoptic_on=False)

# Rasterised by the loader's processes.
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.mapper.augmentations[2].pad = True
dataloader.train.total_batch_size = 16
dataloader.test.mapper.augmentations[0].update(short_edge_length=800, max_size=1333)
dataloader.evaluator.tasks = ("segm",)

train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/maskformer/mask2former/"
    "coco/instance/maskformer2_swin_tiny_bs16_50ep/model_final_86143f.pkl"
)
