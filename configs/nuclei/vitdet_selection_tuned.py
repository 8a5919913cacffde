"""The nuclei's model with learned token selection (SViT), model and selectors trained along with each other."""

from pathlib import Path

from .vitdet_selection import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

optimizer.lr = 2e-4
optimizer.weight_decay = 0.05

train.output_dir = "output/nuclei_selection_tuned"
train.trainable = "all"
train.max_iter = 140
train.eval_period = 140
# The selectors are in it too.
train.init_checkpoint = plan.reducer.selectors = str(Path(__file__).parent / "vitdet_selection_tuned.pth")
plan.reducer.target = 0.4
