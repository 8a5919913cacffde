"""Mask R-CNN with ViTDet-B on COCO."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from hourglass import Plan, TokenClustering
from hourglass.solver import layer_decay_params

from ..common.coco import dataloader
from ..common.mask_rcnn_vitdet import model
from ..common.optimizer import AdamW as optimizer
from ..common.train import evaluation, search, train

# Half of the tokens of each window of 14 x 14, in all blocks but the first and the last, see the README.
plan = L(Plan)(reducer=L(TokenClustering)(grid=[10, 10]), start=1, stop=11, scope="window")

train.init_checkpoint = "detectron2://ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl"
train.amp.enabled = True
# 100 epochs in batches of 64.
train.max_iter = 184375

optimizer.params.update(
    _target_=layer_decay_params,
    decay=0.7,
    overrides=dict(pos_embed=dict(weight_decay=0.0)),
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01],
        milestones=[163889, 177546],
        num_updates=train.max_iter,
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)
