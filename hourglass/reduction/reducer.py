"""
The contract of a reducer: a token map goes in, a smaller one comes out with the way back.

Letters, here and in the reducers: B batch, H x W tokens of the full map, h x w of the smaller one, C channels.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hourglass.errors import InputError

# What the smaller map's result is to a token: its change, or its features.
RESTORE = ("update", "features")

# Pairs of tokens, or of tokens and centres, that are compared at a time: 16 MiB of scores or distances.
PAIRS = 1 << 22


class Reduction(NamedTuple):
    """
    A smaller map, where its tokens lie, and the way back.

    Attributes:
        tokens: (B, h, w, C). With h and w 0 there is nothing for the plan's blocks to run on, and they are left out.
        positions: (B, h, w, 2), centres (y, x) in units of original tokens; None: the regular grid.
        sizes: (B, h, w), how many tokens each stands for, fractional where membership is soft; None: equally many.
        restore: (B, h, w, C) -> (B, H, W, C).
    """

    tokens: Tensor
    positions: Tensor | None
    sizes: Tensor | None
    restore: Callable[[Tensor], Tensor]


class Reducer(nn.Module):
    """
    An operator (B, H, W, C) -> :class:`Reduction`. It keeps nothing between calls: what restoring needs lives in
    ``Reduction.restore``. A module, so that a learned one's weights belong to the model.
    """

    #: Whether the smaller map's tokens lie on its regular grid (``Reduction.positions`` is None).
    on_grid = True
    #: Whether it reduces anew in each of the plan's blocks.
    each_block = False

    def forward(self, tokens: Tensor) -> Reduction:
        raise NotImplementedError

    def relative_to(self, size: tuple[int, int]) -> "Reducer":
        """
        The same reducer with its budget for a map of ``size`` tokens as a share, for the smaller windows at the
        map's edge.
        """
        return self

    def published_form(self) -> "Reducer":
        """
        The same reducer as its authors' code computes it.

        Raises:
            InputError: where it differs in nothing, or is of nobody's.
        """
        raise InputError(f"published=True takes a reducer with a published form, TokenClustering, got {self!r}")

    def describe(self) -> dict[str, Any]:
        """Name and arguments, as plain values."""
        description = {"name": type(self).__name__}
        for parameter in inspect.signature(type(self)).parameters.values():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                value = getattr(self, parameter.name)
                description[parameter.name] = list(value) if isinstance(value, tuple) else value
        return description

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.describe().items() if name != "name")


class MergingReducer(Reducer):
    """
    A reducer that acts in each of the plan's blocks, between attention and perceptron, on what blocks before have left.
    After the last block the reductions are restored, the last one first.
    """

    on_grid = False
    each_block = True

    def left(self, length: int, full: int) -> int:
        """How many tokens a block leaves of ``length``, where there were ``full`` before the plan's first block."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, keys: Tensor, sizes: Tensor, positions: Tensor, n: int) -> Reduction:
        """
        Args:
            tokens: (B, h, w, C), after attention.
            keys: (B, h, w, D), that attention's, in the mean over heads.
            sizes: (B, h, w), how many tokens of the full map each stands for.
            positions: (B, h, w, 2), their centres.
            n: how many tokens to leave, as :meth:`left` says.

        Returns:
            a reduction to a map (B, 1, n, C), with positions and sizes.
        """
        raise NotImplementedError


class SelectingReducer(Reducer):
    """
    A reducer that selects, for each of the plan's blocks anew, the tokens that the block runs on. The others pass by
    unchanged. In blocks with windows attention runs on all tokens and the perceptron on those selected, before which
    they are selected.
    """

    each_block = True

    def forward(self, tokens: Tensor, block: int) -> Reduction:
        """
        Args:
            tokens: (1, H, W, C), of one image: each may keep another number of tokens.
            block: number of the block, counted from the plan's first.

        Returns:
            a reduction to the selected tokens (1, 1, n, C), with positions.
        """
        raise NotImplementedError

    def mask(self, tokens: Tensor, block: int) -> Tensor:
        """
        What training multiplies in place of selecting: (B, H, W, C) -> (B, H, W, 1), 1 for a selected token and 0 for
        another, with a gradient.
        """
        raise NotImplementedError

    def fit(self, channels: Sequence[int]) -> None:
        """
        Make ready for the plan's blocks, of so many channels each.

        Raises:
            InputError: where it does not fit them.
        """


class GridReducer(Reducer):
    """
    A reducer to a grid of tokens.

    Args:
        grid: (rows, columns) of the smaller map; or the share of rows and of columns that is kept, which suits maps
            of any size: a float for both, or two.
    """

    def __init__(self, grid: Sequence[int | float] | float):
        super().__init__()
        pair = (grid, grid) if isinstance(grid, Real) and not isinstance(grid, Integral) else grid
        if not _is_grid(pair):
            raise InputError(f"grid takes (rows, columns), each at least 1, or a share of them in (0, 1], got {grid!r}")
        self.grid = tuple(int(side) if isinstance(side, Integral) else float(side) for side in pair)

    def cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """
        Rows and columns of the smaller map for a map of ``size`` (H, W).

        Raises:
            InputError: for a grid larger than the map.
        """
        cells = tuple(
            side if isinstance(side, int) else max(1, round(side * length)) for side, length in zip(self.grid, size)
        )
        if cells[0] > size[0] or cells[1] > size[1]:
            raise InputError(
                f"grid {self.grid} is larger than the token map, which has {size[0]} x {size[1]} tokens: "
                "take a smaller grid, or a share such as 0.6"
            )
        return cells

    def relative_to(self, size: tuple[int, int]) -> "GridReducer":
        self.cells(size)
        relative = copy.copy(self)
        relative.grid = tuple(side / length if isinstance(side, int) else side for side, length in zip(self.grid, size))
        return relative


def _is_grid(pair: Any) -> bool:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(
        not isinstance(side, bool)
        and (side >= 1 if isinstance(side, Integral) else isinstance(side, Real) and 0 < side <= 1)
        for side in pair
    )


def map_size(tokens: Tensor) -> tuple[int, int]:
    """(H, W) of a map (B, H, W, C), as plain numbers under tracing too."""
    return int(tokens.shape[1]), int(tokens.shape[2])


def grid_positions(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H, W, 2) row and column of each token of a map."""
    return torch.stack(torch.meshgrid(*(torch.arange(side, device=device) for side in size), indexing="ij"), dim=-1)
