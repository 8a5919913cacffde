"""Mask2Former with Swin-T, as published (arXiv 2112.01527), and what the other Swins change."""

from detectron2.config import LazyCall as L

from hourglass.encoders import Swin
from projects.mask2former import Mask2Former

model = L(Mask2Former)(
    backbone=L(Swin)(
        pretrain_img_size=224,
        patch_size=4,
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.3,
        out_names=["res2", "res3", "res4", "res5"],
    ),
    # COCO panoptic: things before stuff.
    num_classes=133,
    things=list(range(80)),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    num_queries=100,
    panoptic_on=True,
    instance_on=True,
    semantic_on=False,
    object_mask_threshold=0.8,
    overlap_threshold=0.8,
    detections_per_image=100,
)

swin_s = dict(depths=[2, 2, 18, 2])
swin_b = dict(pretrain_img_size=384, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12)
swin_l = dict(pretrain_img_size=384, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12)
