"""
The nuclei's model without windows, in which every block attends over the whole map as in SViT's plain ViT, with learned
token selection.
"""

from pathlib import Path

from .vitdet_selection import dataloader, evaluation, lr_multiplier, model, optimizer, plan, search, train

model.backbone.net.window_block_indexes = []

train.output_dir = "output/nuclei_windowless"
train.init_checkpoint = str(Path(__file__).parent / "vitdet_windowless.pth")
plan.reducer.selectors = str(Path(__file__).parent / "vitdet_windowless_selectors_60.pth")
