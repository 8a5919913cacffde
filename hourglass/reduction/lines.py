"""
Equal merges in every row, then in every column, so that the smaller map is a dense grid (the idea of CubistMerge, arXiv
2509.21764). Ours are the cost of a merge, which is Ward's, and that rows and columns take turns.

Letters: N lines of L tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hourglass.checks import check_choice, renamed_argument
from hourglass.contexts import without_autocast
from hourglass.operators import is_exporting, operator
from hourglass.reduction.merging import merge, merge_sizes, restore_merged
from hourglass.reduction.reducer import RESTORE_MODES, GridReducer, Reduction
from hourglass.reduction.windows import map_size

# Rows and columns take turns so often: at a quarter of the tokens twice halves the error of once.
TURNS = 2
# Channels that merges are chosen by, evenly spaced, about.
CHANNELS = 64


def merge_lines(features: Tensor, sizes: Tensor, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Merge neighbours of every line until ``target`` tokens remain. Every second token may merge with the nearer one of
    its two neighbours; those whose merges add least to the squared error (Ward, JASA 58, 1963), |a - b|^2 times the
    harmonic mean of their sizes, do, half of them at a time at most. Of equal ones the first comes first.

    Args:
        features: (N, L, C), float.
        sizes: (N, L), how many tokens each stands for.
        target: from 1 to L.

    Returns:
        (N, target, C), (N, target), and labels (N, L) int64: the token that each became a part of.
    """
    labels = torch.arange(features.shape[1], device=features.device).expand(features.shape[0], -1)
    while (before := int(features.shape[1])) > target:
        length = max(target, (before + 1) // 2)
        joined = _join(features, sizes, before - length)
        features = merge(features, joined, length, sizes)
        sizes = merge_sizes(sizes, joined, length)
        labels = joined.gather(1, labels)
    return features, sizes, labels


def _join(features: Tensor, sizes: Tensor, number: int) -> Tensor:
    """(N, L): the place of each token after ``number`` merges in each line."""
    lines, length = _numbers(sizes)
    movers = (length + 1) // 2
    cost = (features[:, 1:] - features[:, :-1]).square().sum(-1)
    cost = cost * (sizes[:, 1:] * sizes[:, :-1] / (sizes[:, 1:] + sizes[:, :-1]))
    to_right, to_left = (cost.new_full((lines, movers), torch.inf) for _ in range(2))
    to_right[:, : length // 2] = cost[:, 0::2]
    to_left[:, 1:] = cost[:, 1::2]
    least = torch.minimum(to_right, to_left)
    chosen = least.sort(dim=1, stable=True).indices[:, :number]
    step = torch.where(to_left < to_right, -1, 1).gather(1, chosen)
    place = torch.arange(length, device=cost.device).repeat(lines, 1)
    stays = torch.ones_like(place).scatter_(1, 2 * chosen, 0)
    place.scatter_(1, 2 * chosen, 2 * chosen + step)
    return (stays.cumsum(1) - 1).gather(1, place)


@operator(
    "Tensor tokens, SymInt h, SymInt w",
    lambda tokens, h, w: [tokens.shape[0], tokens.shape[1] * tokens.shape[2]],
    torch.int64,
)
def _merge_grid(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W, C) -> (B, H * W) int64, in [0, h * w): the token of the smaller map that each merges into."""
    batch, *full, channels = _numbers(tokens)
    features = tokens[..., :: max(1, channels // CHANNELS)].float()
    sizes = torch.ones_like(features[..., 0])
    labels = torch.arange(full[0] * full[1], device=tokens.device).expand(batch, -1)
    for turn in range(1, TURNS + 1):
        for axis, target in ((2, int(w)), (1, int(h))):
            rows, columns = map(int, features.shape[1:3])
            goal = full[axis - 1] - round((full[axis - 1] - target) * turn / TURNS)
            lines = features if axis == 2 else features.transpose(1, 2)
            of_lines = sizes if axis == 2 else sizes.transpose(1, 2)
            number = rows if axis == 2 else columns
            lines, of_lines, joined = merge_lines(lines.flatten(0, 1), of_lines.flatten(0, 1), goal)
            features, sizes, joined = (values.unflatten(0, (batch, -1)) for values in (lines, of_lines, joined))
            line = torch.arange(number, device=tokens.device)[:, None]
            if axis == 2:
                joined = line * goal + joined
            else:
                features, sizes = features.transpose(1, 2), sizes.transpose(1, 2)
                joined = (joined * columns + line).transpose(1, 2)
            labels = joined.reshape(batch, rows * columns).gather(1, labels)
    return labels


def _numbers(tensor: Tensor) -> tuple[int, ...]:
    """Its shape as plain numbers under tracing too; an exported program may leave the number of windows open."""
    return tuple(tensor.shape) if is_exporting() else tuple(map(int, tensor.shape))


class GridMerging(GridReducer):
    """
    Merges similar neighbours in every row, then in every column, until the grid is reached (the idea of CubistMerge,
    arXiv 2509.21764). The result is a dense grid, whose relative positions are read as those of a regular one.

    Args:
        grid: see :class:`~hourglass.reduction.GridReducer`.
        restore_mode: "update": a token keeps its features and gets the change of what it merged into; "features": it
            gets the features.

    Raises:
        InputError: for an argument out of range.
    """

    any_size = False

    @renamed_argument("restore", "restore_mode")
    def __init__(self, grid: Sequence[int | float] | float, restore_mode: str = "update"):
        super().__init__(grid)
        check_choice("restore_mode", restore_mode, RESTORE_MODES)
        self.restore_mode: str = restore_mode

    def forward(self, tokens: Tensor) -> Reduction:
        size, (h, w) = map_size(tokens), self.cells(map_size(tokens))
        flat = tokens.flatten(1, 2)
        with torch.no_grad(), without_autocast(tokens):
            labels = _merge_grid(tokens, h, w)
            sizes = merge_sizes(torch.ones_like(labels, dtype=torch.float32), labels, h * w)
        merged = merge(flat, labels, h * w)

        def restore(refined: Tensor) -> Tensor:
            return restore_merged(flat, merged, labels, self.restore_mode, refined.flatten(1, 2)).unflatten(1, size)

        return Reduction(merged.unflatten(1, (h, w)), None, sizes.unflatten(1, (h, w)), restore)
