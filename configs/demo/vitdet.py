"""The demo: a small ViTDet Mask R-CNN, trained from scratch on the drawn scenes of hourglass/data."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ..common.coco import dataloader
from ..common.mask_rcnn_vitdet import model
from ..common.optimizer import AdamW as optimizer
from ..common.train import evaluation, train
import detectron2.data.transforms as T

net = model.backbone.net
net.img_size = net.pretrain_img_size = 512
net.pretrain_use_cls_token = False
net.embed_dim, net.depth, net.num_heads = 192, 10, 3
net.drop_path_rate = 0.0
net.window_size = 8
# 4 and 9 are global.
net.window_block_indexes = [0, 1, 2, 3, 5, 6, 7, 8]

model.backbone.square_pad = 512
model.backbone.out_channels = 96
model.backbone.scale_factors = (2.0, 1.0, 0.5)
model.backbone.top_block = None

rpn = model.proposal_generator
rpn.in_features = ["p3", "p4", "p5"]
rpn.head.conv_dims = [-1]
rpn.head.num_anchors = 2
rpn.anchor_generator.sizes = [[16, 32], [48, 80], [128, 208]]
rpn.anchor_generator.aspect_ratios = [1.0]
rpn.anchor_generator.strides = [8, 16, 32]
rpn.pre_nms_topk = (400, 400)
rpn.post_nms_topk = (200, 200)
rpn.batch_size_per_image = 128

heads = model.roi_heads
heads.num_classes = 10
heads.batch_size_per_image = 64
heads.box_in_features = ["p3", "p4", "p5"]
heads.box_pooler.scales = (1.0 / 8, 1.0 / 16, 1.0 / 32)
heads.box_head.conv_dims = [96]
heads.box_head.fc_dims = [256]
heads.mask_head.conv_dims = [96, 96, 96]

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

train.max_iter = 7000
train.amp.enabled = True
train.clip_gradient = 1.0
train.checkpointer.period = 500
train.eval_period = 1000
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.005),
    warmup_length=300 / train.max_iter,
    warmup_factor=0.01,
)
