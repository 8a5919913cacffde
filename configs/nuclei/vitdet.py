"""Nuclei in microscopy: a small ViTDet Mask R-CNN with a semantic head, trained from scratch on BBBC038."""

from pathlib import Path

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch import PanopticFPN
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from hourglass import Plan, TokenClustering
from hourglass.data import EnlargeShortestEdge, PanopticMapper, RandomStain, StretchContrast
from hourglass.evaluation import InstanceEvaluator, PanopticEvaluator
from projects.nuclei import register_nuclei

from ..common.coco import dataloader
from ..common.mask_rcnn_vitdet import model
from ..common.optimizer import AdamW as optimizer
from ..common.train import evaluation, search, train

register_nuclei()

# An image has up to 375 nuclei.
MAX_DETECTIONS = 500
TRAINING_CROP = 384

model.backbone.net.update(
    img_size=512,
    patch_size=8,
    # The images have any size, and nuclei look the same everywhere.
    use_abs_pos=False,
    embed_dim=128,
    depth=12,
    num_heads=2,
    drop_path_rate=0.0,
    window_size=16,
    # 2, 5 and 8 are global.
    window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10, 11],
)
model.backbone.update(square_pad=0, out_channels=96, scale_factors=(2.0, 1.0, 0.5), top_block=None)

model.proposal_generator.update(
    in_features=["p2", "p3", "p4"],
    pre_nms_topk=(1000, 2000),
    post_nms_topk=(500, 1000),
)
model.proposal_generator.head.conv_dims = [-1]
model.proposal_generator.anchor_generator.update(
    sizes=[[12, 20, 32], [44, 60, 80], [100, 128, 160]], aspect_ratios=[1.0], strides=[4, 8, 16]
)

model.roi_heads.update(num_classes=1, batch_size_per_image=128, box_in_features=["p2", "p3", "p4"])
model.roi_heads.box_pooler.scales = (1.0 / 4, 1.0 / 8, 1.0 / 16)
model.roi_heads.box_head.update(conv_dims=[96], fc_dims=[256])
model.roi_heads.box_predictor.test_topk_per_image = MAX_DETECTIONS
model.roi_heads.mask_head.conv_dims = [96, 96, 96]

# With one class of things, Detectron2's label of all things and of the one class, and of the background, are the same.
model._target_ = PanopticFPN
model.sem_seg_head = L(SemSegFPNHead)(
    input_shape={"p2": L(ShapeSpec)(channels=96, stride=4), "p3": L(ShapeSpec)(channels=96, stride=8)},
    num_classes=2,
    conv_dims=64,
    common_stride=4,
    norm="GN",
    ignore_value=255,
    loss_weight=0.5,
)
model.combine_stuff_area_thresh = 0
model.pixel_mean = [96.0, 96.0, 96.0]
model.pixel_std = [64.0, 64.0, 64.0]

dataloader.train.dataset.names = "hourglass_nuclei_train"
dataloader.train.mapper = L(PanopticMapper)(
    augmentations=[
        L(StretchContrast)(),
        L(RandomStain)(),
        L(T.RandomContrast)(intensity_min=0.7, intensity_max=1.3),
        L(T.RandomBrightness)(intensity_min=0.7, intensity_max=1.3),
        L(T.RandomSaturation)(intensity_min=0.7, intensity_max=1.3),
        L(T.RandomFlip)(horizontal=True, vertical=False),
        L(T.RandomRotation)(angle=[0, 90, 180, 270], sample_style="choice"),
        L(EnlargeShortestEdge)(length=512, zoom=(0.75, 1.5)),
        L(T.RandomCrop)(crop_type="absolute", crop_size=(TRAINING_CROP, TRAINING_CROP)),
    ],
    image_format="RGB",
    stuff=False,
    semantic=True,
)
dataloader.train.total_batch_size = 6
dataloader.train.num_workers = 1
dataloader.test.dataset.names = "hourglass_nuclei_val"
dataloader.test.mapper.augmentations = [L(StretchContrast)(), L(EnlargeShortestEdge)(length=512)]
dataloader.test.num_workers = 1
dataloader.evaluator = [
    L(InstanceEvaluator)(
        dataset_name="${...test.dataset.names}",
        tasks=("bbox", "segm"),
        max_dets_per_image=MAX_DETECTIONS,
        use_fast_impl=False,
    ),
    L(PanopticEvaluator)(dataset_name="${...test.dataset.names}"),
]

optimizer.lr = 8e-4
optimizer.weight_decay = 0.05

train.output_dir = "output/nuclei"
train.init_checkpoint = str(Path(__file__).parent / "vitdet.pth")
train.max_iter = 1500
train.amp.enabled = True
train.clip_gradient = 1.0
train.checkpointer.period = 200
train.eval_period = 0
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.005),
    warmup_length=150 / train.max_iter,
    warmup_factor=0.01,
)

# What --search keep=0.975 found on training images, see the README. Its calibration is fitted to 22 others of them.
plan = L(Plan)(
    reducer=L(TokenClustering)(grid=[8, 8]),
    start=2,
    stop=11,
    scope="window",
    calibration=str(Path(__file__).parent / "vitdet_calibration.pth"),
)
