"""The demo: a small ViTDet Mask R-CNN, trained from scratch on the drawn scenes of projects/demo."""

from pathlib import Path

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from hourglass import GridMerging, Plan
from projects.demo import register_demo

from ..common.coco import dataloader
from ..common.mask_rcnn_vitdet import model
from ..common.optimizer import AdamW as optimizer
from ..common.train import evaluation, search, train

register_demo()

model.backbone.net.update(
    img_size=512,
    patch_size=8,
    pretrain_img_size=512,
    pretrain_use_cls_token=False,
    embed_dim=128,
    depth=8,
    num_heads=2,
    drop_path_rate=0.0,
    window_size=16,
    # 4 is global.
    window_block_indexes=[0, 1, 2, 3, 5, 6, 7],
)
model.backbone.update(square_pad=512, out_channels=96, scale_factors=(1.0, 0.5), top_block=None)

model.proposal_generator.update(
    in_features=["p3", "p4"],
    pre_nms_topk=(400, 400),
    post_nms_topk=(200, 200),
    batch_size_per_image=128,
)
model.proposal_generator.head.conv_dims = [-1]
model.proposal_generator.anchor_generator.update(
    sizes=[[16, 32, 56], [96, 144, 208]], aspect_ratios=[1.0], strides=[8, 16]
)

model.roi_heads.update(num_classes=10, batch_size_per_image=64, box_in_features=["p3", "p4"])
model.roi_heads.box_pooler.scales = (1.0 / 8, 1.0 / 16)
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

optimizer.lr = 8e-4
optimizer.weight_decay = 0.05

train.output_dir = "output/demo"
train.init_checkpoint = str(Path(__file__).parent / "vitdet.pth")
train.max_iter = 1600
train.amp.enabled = True
train.clip_gradient = 1.0
train.checkpointer.period = 400
train.eval_period = 1600
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.005),
    warmup_length=150 / train.max_iter,
    warmup_factor=0.01,
)

search.dataset = "hourglass_demo_search"

# What `--search keep=0.99` found, see the README.
plan = L(Plan)(
    reducer=L(GridMerging)(grid=[12, 12]),
    start=0,
    stop=4,
    scope="window",
    keys=2,
    calibration=str(Path(__file__).parent / "vitdet_calibration.pth"),
)
