from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass.checks import check_choice, renamed_argument
from hourglass.operators import is_exporting, operator
from hourglass.reduction.reducer import RESTORE_MODES, GridReducer, Reduction
from hourglass.reduction.windows import map_size


def average_pool(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling, (B, H, W, C) -> (B, h, w, C)."""
    return _average_pool(tokens, *grid)


@operator("Tensor tokens, SymInt h, SymInt w", lambda tokens, h, w: [tokens.shape[0], h, w, tokens.shape[3]])
def _average_pool(tokens: Tensor, h: int, w: int) -> Tensor:
    if is_exporting():  # ONNX has no such operator
        rows, columns = (_shares(length, cells, tokens) for length, cells in zip(tokens.shape[1:3], (h, w)))
        pooled = rows @ tokens.flatten(2)  # (B, h, W * C)
        return columns @ pooled.unflatten(2, (tokens.shape[2], tokens.shape[3]))
    return F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), (h, w)).permute(0, 2, 3, 1)


def _shares(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length) what each cell's mean has of each token: as much of all from its first to its last."""
    cell, token = torch.arange(cells, device=like.device)[:, None], torch.arange(length, device=like.device)
    first, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = ((token >= first) & (token < end)).to(like.dtype)
    return inside / (end - first)


class AveragePooling(GridReducer):
    """
    The plain baseline: adaptive average pooling, restored by bilinear interpolation.

    Args:
        grid: see :class:`~hourglass.reduction.GridReducer`.
        restore_mode: "update": each token keeps its features and gets the interpolated change; "features": the
            interpolated features themselves.

    Raises:
        InputError: for an argument out of range.
    """

    @renamed_argument("restore", "restore_mode")
    def __init__(self, grid: Sequence[int | float] | float, restore_mode: str = "update"):
        super().__init__(grid)
        check_choice("restore_mode", restore_mode, RESTORE_MODES)
        self.restore_mode = restore_mode

    def forward(self, tokens: Tensor) -> Reduction:
        size = map_size(tokens)
        pooled = average_pool(tokens, self.cells(size))

        def enlarge(reduced: Tensor) -> Tensor:
            reduced = reduced.permute(0, 3, 1, 2)
            return F.interpolate(reduced, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)

        def restore(refined: Tensor) -> Tensor:
            return tokens + enlarge(refined - pooled) if self.restore_mode == "update" else enlarge(refined)

        return Reduction(pooled, positions=None, sizes=None, restore=restore)
