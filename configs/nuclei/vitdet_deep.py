"""The nuclei's model with 12 blocks, warm-started from that with 8, see the README."""

from pathlib import Path

from detectron2.config import LazyCall as L

from hourglass import Plan, TokenClustering

from .vitdet import dataloader, evaluation, lr_multiplier, model, optimizer, search, train

model.backbone.net.update(
    depth=12,
    # 2, 5 and 8 are global.
    window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10, 11],
)

optimizer.lr = 4e-4

train.output_dir = "output/nuclei_deep"
train.init_checkpoint = str(Path(__file__).parent / "vitdet_deep.pth")
train.max_iter = 1200
train.checkpointer.period = 100
lr_multiplier.warmup_length = 150 / train.max_iter

plan = L(Plan)(reducer=L(TokenClustering)(grid=[8, 8]), start=1, stop=11, scope="window")
