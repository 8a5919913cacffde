"""Mask R-CNN with ViTDet-H on COCO."""

from .mask_rcnn_b import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.backbone.net.update(
    embed_dim=1280,
    depth=32,
    num_heads=16,
    drop_path_rate=0.5,
    # 7, 15, 23 and 31 are global.
    window_block_indexes=[i for i in range(32) if i % 8 != 7],
)

plan.stop = 31

train.init_checkpoint = "detectron2://ViTDet/COCO/mask_rcnn_vitdet_h/f329145471/model_final_7224f1.pkl"

# Weight decay for all parameters.
optimizer.params.decay = 0.9
optimizer.params.overrides = {}
optimizer.params.weight_decay_norm = None

# 75 epochs.
train.max_iter = 138281
lr_multiplier.scheduler.milestones = [122916, 133159]
lr_multiplier.scheduler.num_updates = train.max_iter
lr_multiplier.warmup_length = 250 / train.max_iter
