"""The demo: a small ViTDet Mask R-CNN, trained from scratch on the drawn scenes of hourglass/data."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ..common.coco import dataloader
from ..common.mask_rcnn_vitdet import model
from ..common.optimizer import AdamW as optimizer
from ..common.train import evaluation, train
from hourglass import Plan, TokenClustering
from hourglass.data import register_demo

register_demo()

model.backbone.net.update(
    img_size=512,
    pretrain_img_size=512,
    pretrain_use_cls_token=False,
    embed_dim=192,
    depth=10,
    num_heads=3,
    drop_path_rate=0.0,
    window_size=8,
    # 4 and 9 are global.
    window_block_indexes=[0, 1, 2, 3, 5, 6, 7, 8],
)
model.backbone.update(square_pad=512, out_channels=96, scale_factors=(2.0, 1.0, 0.5), top_block=None)

model.proposal_generator.update(
    in_features=["p3", "p4", "p5"],
    pre_nms_topk=(400, 400),
    post_nms_topk=(200, 200),
    batch_size_per_image=128,
)
model.proposal_generator.head.update(conv_dims=[-1], num_anchors=2)
model.proposal_generator.anchor_generator.update(
    sizes=[[16, 32], [48, 80], [128, 208]], aspect_ratios=[1.0], strides=[8, 16, 32]
)

model.roi_heads.update(num_classes=10, batch_size_per_image=64, box_in_features=["p3", "p4", "p5"])
model.roi_heads.box_pooler.scales = (1.0 / 8, 1.0 / 16, 1.0 / 32)
model.roi_heads.box_head.update(conv_dims=[96], fc_dims=[256])
model.roi_heads.mask_head.conv_dims = [96, 96, 96]

dataloader.train.dataset.names = "hourglass_demo_train"
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.mapper.recompute_boxes = False
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True, vertical=False),
    L(T.RandomFlip)(horizontal=False, vertical=True),
]
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 1
dataloader.test.dataset.names = "hourglass_demo_val"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 1

optimizer.lr = 6e-4
optimizer.weight_decay = 0.05

train.max_iter = 6500
train.amp.enabled = True
train.clip_gradient = 1.0
train.checkpointer.period = 500
train.eval_period = 1500
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.005),
    warmup_length=300 / train.max_iter,
    warmup_factor=0.01,
)

plan = L(Plan)(reducer=L(TokenClustering)(grid=[20, 20]), start=2, stop=10)
