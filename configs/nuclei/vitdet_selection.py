"""The nuclei's model with learned token selection (SViT): its weights stay, selectors are trained beside them."""

from pathlib import Path

from detectron2.config import LazyCall as L

from hourglass import Plan, TokenSelection

from .vitdet import dataloader, evaluation, lr_multiplier, model, optimizer, search, train

optimizer.lr = 5e-3
optimizer.weight_decay = 0.0

train.output_dir = "output/nuclei_selection"
train.expedite = True
train.trainable = "reducer"
train.max_iter = 300
train.eval_period = 300
lr_multiplier.warmup_length = 0.08

plan = L(Plan)(
    reducer=L(TokenSelection)(selectors=str(Path(__file__).parent / "vitdet_selectors_60.pth"), target=0.6),
    start=2,
    stop=10,
)
