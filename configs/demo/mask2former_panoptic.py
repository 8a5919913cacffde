"""The panoptic demo: a small Swin Mask2Former, trained from scratch on the drawn scenes of projects/demo."""

from pathlib import Path

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from hourglass import GridMerging, Plan
from hourglass.data import PanopticMapper
from hourglass.encoders import Swin
from hourglass.evaluation import InstanceEvaluator, PanopticEvaluator
from projects.demo import STUFF, THINGS, register_demo
from projects.mask2former import Mask2Former, optimizer_params

from ..common.coco import dataloader
from ..common.optimizer import AdamW as optimizer
from ..common.train import evaluation, search, train

register_demo()

model = L(Mask2Former)(
    backbone=L(Swin)(
        patch_size=4,
        embed_dim=64,
        # Most of the work is in the second stage, of 64 x 64 tokens.
        depths=(1, 10, 2, 1),
        num_heads=(2, 4, 8, 16),
        window_size=8,
        drop_path_rate=0.0,
        out_names=("res2", "res3", "res4", "res5"),
    ),
    num_classes=len(THINGS) + len(STUFF),
    things=list(range(len(THINGS))),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    num_queries=40,
    hidden_dim=96,
    mask_dim=96,
    num_heads=6,
    encoder_layers=2,
    encoder_feedforward_dim=256,
    decoder_layers=4,
    dim_feedforward=384,
    instance_on=True,
    object_mask_threshold=0.15,
    overlap_threshold=0.5,
    detections_per_image=50,
    train_num_points=2048,
    # The masks are easy here, the classes are not. With little cost of queries that repeat a segment, each of these
    # would learn one class instead of how to tell the classes.
    class_weight=3.0,
    class_cost=0.5,
    mask_weight=4.0,
    dice_weight=4.0,
    no_object_weight=0.2,
)

dataloader.train.dataset.names = "hourglass_demo_coloured_train"
dataloader.train.dataset.filter_empty = False
dataloader.train.mapper = L(PanopticMapper)(
    augmentations=[
        L(T.RandomFlip)(horizontal=True, vertical=False),
        L(T.RandomFlip)(horizontal=False, vertical=True),
        L(T.ResizeScale)(min_scale=0.5, max_scale=1.0, target_height=512, target_width=512),
        L(T.RandomCrop)(crop_type="absolute", crop_size=(256, 256)),
    ],
    image_format="RGB",
)
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
dataloader.test.dataset.names = "hourglass_demo_coloured_val"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 1
dataloader.evaluator = [
    L(PanopticEvaluator)(dataset_name="${...test.dataset.names}"),
    L(InstanceEvaluator)(dataset_name="${...test.dataset.names}", tasks=("segm",), use_fast_impl=False),
]

optimizer.params = L(optimizer_params)(base_lr="${..lr}", weight_decay="${..weight_decay}", backbone_multiplier=1.0)
optimizer.lr = 5e-4
optimizer.weight_decay = 0.05

train.output_dir = "output/demo_panoptic"
train.init_checkpoint = str(Path(__file__).parent / "mask2former_panoptic.pth")
train.max_iter = 1500
train.amp.enabled = True
train.clip_gradient = 1.0
train.checkpointer.period = 500
train.eval_period = 1500
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.005),
    warmup_length=100 / train.max_iter,
    warmup_factor=0.01,
)

search.dataset = "hourglass_demo_coloured_search"

# What --search speed=1.6 found on images that it was not trained on, see the README.
plan = L(Plan)(
    reducer=L(GridMerging)(grid=[4, 4]),
    start=1,
    stop=11,
    scope="window",
    calibration=str(Path(__file__).parent / "mask2former_panoptic_calibration.pth"),
)
