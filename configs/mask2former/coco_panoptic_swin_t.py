"""Mask2Former with Swin-T on COCO panoptic."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from hourglass import Plan, TokenClustering
from hourglass.data import PanopticMapper
from hourglass.evaluation import InstanceEvaluator, PanopticEvaluator
from projects.mask2former import optimizer_params

from ..common.coco import dataloader
from ..common.mask2former import model
from ..common.optimizer import AdamW as optimizer
from ..common.train import evaluation, search, train

# The third stage is blocks 4 to 9; it begins on the full map.
plan = L(Plan)(reducer=L(TokenClustering)(grid=[5, 5]), start=6, stop=10, scope="window")

dataloader.train.dataset.names = "coco_2017_train_panoptic"
# An image without things has stuff.
dataloader.train.dataset.filter_empty = False
dataloader.train.mapper = L(PanopticMapper)(augmentations=dataloader.train.mapper.augmentations, image_format="RGB")
dataloader.train.mapper.augmentations[2].pad = True
dataloader.train.total_batch_size = 16
dataloader.test.dataset.names = "coco_2017_val_panoptic"
dataloader.test.mapper.augmentations[0].update(short_edge_length=800, max_size=1333)
dataloader.evaluator = [
    L(PanopticEvaluator)(dataset_name="${...test.dataset.names}"),
    L(InstanceEvaluator)(dataset_name="${...test.dataset.names}", tasks=("segm",), use_fast_impl=False),
]

train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/maskformer/mask2former/"
    "coco/panoptic/maskformer2_swin_tiny_bs16_50ep/model_final_9fd0ae.pkl"
)
train.amp.enabled = True
train.clip_gradient = 0.01
# 50 epochs in batches of 16.
train.max_iter = 368750

optimizer.params = L(optimizer_params)(base_lr="${..lr}", weight_decay="${..weight_decay}", backbone_multiplier=0.1)
optimizer.weight_decay = 0.05
lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1, 0.01],
    milestones=[327778, 355092],
    num_updates=train.max_iter,
)
