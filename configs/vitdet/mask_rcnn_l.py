"""Mask R-CNN with ViTDet-L on COCO."""

from .mask_rcnn_b import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.backbone.net.update(
    embed_dim=1024,
    depth=24,
    num_heads=16,
    drop_path_rate=0.4,
    # 5, 11, 17 and 23 are global.
    window_block_indexes=[i for i in range(24) if i % 6 != 5],
)

plan.stop = 23

train.init_checkpoint = "detectron2://ViTDet/COCO/mask_rcnn_vitdet_l/f325599698/model_final_6146ed.pkl"

optimizer.params.decay = 0.8
