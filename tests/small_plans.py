"""Plans for the small encoders."""

import torch

from hourglass import (
    BipartiteMatching,
    DensityPeaks,
    GridMerging,
    Plan,
    TokenSelection,
)


def selection(bias: float = 0.0, target: float = 0.5) -> TokenSelection:
    """Selectors that keep some tokens; all or none where ``bias`` is large."""
    torch.manual_seed(3)
    reducer = TokenSelection("random", target)
    reducer.bind([16, 16, 16])
    with torch.no_grad():
        for selector in reducer.blocks:
            selector[3].weight.normal_()
            selector[3].bias.copy_(torch.tensor([bias, 0.0]))
    return reducer.double()


FEWER = {
    "peaks": lambda: Plan(DensityPeaks(0.6), 1, 4, scope="window"),
    "peaks' features": lambda: Plan(DensityPeaks((3, 2), restore_mode="features"), 1, 4, scope="window"),
    "matching": lambda: Plan(BipartiteMatching(0.2), 1, 4, scope="window"),
    "matching's features": lambda: Plan(BipartiteMatching(3, restore_mode="features"), 1, 4, scope="window"),
    "merged grid": lambda: Plan(GridMerging(0.6), 1, 4, scope="window"),
    "selection": lambda: Plan(selection(), 1, 4),
}
