"""Mask2Former with Swin-L (ImageNet-21k, 384) on ADE20K panoptic."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from hourglass.data.panoptic import register_ade20k_panoptic
from hourglass.evaluation import PanopticEvaluator, SemanticEvaluator

from .coco_panoptic_swin_l import dataloader, evaluation, model, optimizer, plan, search, train

register_ade20k_panoptic()

# fmt: off
STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79,
    84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
)
# fmt: on
model.update(num_classes=150, things=[i for i in range(150) if i not in STUFF], instance_on=False, semantic_on=True)

plan.start = 14

dataloader.train.dataset.names = "ade20k_panoptic_train"
# The published recipe also varies the colours.
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=[64 * i for i in range(5, 21)], max_size=2560, sample_style="choice"),
    L(T.RandomCrop)(crop_type="absolute", crop_size=(640, 640)),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.test.dataset.names = "ade20k_panoptic_val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=640, max_size=2560)
dataloader.evaluator = [
    L(PanopticEvaluator)(dataset_name="${...test.dataset.names}"),
    L(SemanticEvaluator)(dataset_name="${...test.dataset.names}"),
]

train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/maskformer/mask2former/"
    "ade20k/panoptic/maskformer2_swin_large_IN21k_384_bs16_160k/model_final_e0c58e.pkl"
)
train.max_iter = 160000
lr_multiplier = L(PolynomialDecayParamScheduler)(base_value=1.0, power=0.9)
