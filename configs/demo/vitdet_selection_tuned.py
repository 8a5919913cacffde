"""The demo with learned token selection (SViT), model and selectors trained along with each other."""

from pathlib import Path

from .vitdet_selection import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

optimizer.lr = 3e-4
optimizer.weight_decay = 0.05

train.output_dir = "output/demo_selection_tuned"
train.trainable = "all"
train.max_iter = 2800
train.eval_period = 2800
# The selectors are in it too.
train.init_checkpoint = plan.reducer.selectors = str(Path(__file__).parent / "vitdet_selection_tuned.pth")
