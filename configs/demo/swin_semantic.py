"""What the panoptic demo's encoder learns first: the class of every pixel, with Detectron2's semantic head."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemanticSegmentor, SemSegFPNHead
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .mask2former_panoptic import dataloader, evaluation, optimizer, plan, search, train
from .mask2former_panoptic import model as mask2former

model = L(SemanticSegmentor)(
    backbone=mask2former.backbone,
    sem_seg_head=L(SemSegFPNHead)(
        input_shape={
            f"res{level + 2}": L(ShapeSpec)(channels=mask2former.backbone.embed_dim * 2**level, stride=4 * 2**level)
            for level in range(4)
        },
        num_classes=mask2former.num_classes,
        conv_dims=64,
        common_stride=4,
        norm="GN",
        ignore_value=255,
    ),
    pixel_mean=mask2former.pixel_mean,
    pixel_std=mask2former.pixel_std,
)

dataloader.train.mapper.semantic = True
# Many small objects: what counts for learning classes is how many are seen.
dataloader.train.mapper.augmentations[2].max_scale = 0.6
dataloader.evaluator = []

optimizer.lr = 1e-3

train.output_dir = "output/demo_semantic"
train.init_checkpoint = ""
train.max_iter = 1300
train.checkpointer.period = 325
train.eval_period = 0
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=100 / train.max_iter,
    warmup_factor=0.01,
)
