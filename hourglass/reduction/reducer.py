"""
The interface of reducers: a token map goes in, a smaller map and the function that restores it come out.

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
from hourglass.reduction.windows import WindowList, map_size

# What restoring gives a token: the change of the token that stands for it, or that one's features.
RESTORE_MODES = ("update", "features")

# Pairs of tokens, or of tokens and centres, that are compared at a time: 16 MiB of scores or distances.
PAIRS = 1 << 22


class Place(NamedTuple):
    """
    What a block needs to know about the tokens (B, h, w, C) that it runs on.

    Attributes:
        full: (H, W) of the full map; equal to (h, w) where the tokens are the full map.
        sizes: (B, h, w), how many tokens each stands for: its logarithm is added to a key's score. None: equally many.
        positions: (B, h, w, 2), centres (y, x) in units of original tokens; None: the regular grid.
        window: (wh, ww), rows and columns of an attention window among them; None: shrunk as the map is.
        listed: the windows of a list of tokens, (B, 1, L, C), and how many tokens those of each kind have
            (:class:`~hourglass.reduction.windows.WindowList`); None: a map.
        mask: (B, h, w, 1), 1 for tokens that take part and 0 for the others, with a gradient. No token attends to the
            others, and the block does not change them. None: all take part.
        between: called between attention and MLP with the tokens (B, h, w, C) and the attention's keys, averaged over
            heads (B, h, w, D). It returns the tokens for the MLP, and a mask of the MLP's update or None.
        restore: maps the MLP's result back to a map, before the block's convolutions, if it has any.
    """

    full: tuple[int, int]
    sizes: Tensor | None = None
    positions: Tensor | None = None
    window: tuple[int, int] | None = None
    listed: tuple[WindowList, list[int]] | None = None
    mask: Tensor | None = None
    between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None = None
    restore: Callable[[Tensor], Tensor] | None = None


class Reduction(NamedTuple):
    """
    What a reducer returns: a smaller map, the positions of its tokens, and the function that restores the full map.

    Attributes:
        tokens: (B, h, w, C). If h and w are 0, the plan's blocks are skipped.
        positions: (B, h, w, 2), centres (y, x) in units of original tokens; None: the regular grid.
        sizes: (B, h, w), how many tokens each stands for, fractional where membership is soft; None: equally many.
        restore: maps the refined tokens (B, h, w, C) to the full map (B, H, W, C).
        window: (wh, ww), rows and columns of an attention window on the smaller map; None: shrunk as the map is.
    """

    tokens: Tensor
    positions: Tensor | None
    sizes: Tensor | None
    restore: Callable[[Tensor], Tensor]
    window: tuple[int, int] | None = None


class Reducer(nn.Module):
    """
    Base class of reducers: modules that map tokens (B, H, W, C) to a :class:`Reduction`. A reducer keeps no state
    between calls: what restoring needs lives in ``Reduction.restore``.
    """

    #: Whether the smaller map's tokens lie on its regular grid (``Reduction.positions`` is None).
    on_grid = True
    #: Whether it reduces again in each of the plan's blocks.
    each_block = False
    #: Whether the number of tokens that run depends on the image.
    selects = False
    #: Whether it runs blocks on lists of tokens, in which windows may have any number of tokens.
    takes_lists = False
    #: Whether its steps are the same for maps of any size, so that one exported program takes them all.
    any_size = True
    #: The scopes that a plan may apply it in.
    scopes: tuple[str, ...] = ("map", "window")
    #: Whether it can only run with a calibration.
    needs_calibration = False

    def forward(self, tokens: Tensor) -> Reduction:
        raise NotImplementedError

    def run(self, tokens: Tensor, blocks: Sequence[nn.Module], proportional: bool, first: int = 0) -> Tensor:
        """
        Run blocks on fewer tokens and restore the full map.

        Args:
            tokens: (B, H, W, C).
            blocks: called with tokens and their :class:`Place`; return the refined tokens.
            proportional: whether blocks get the number of tokens that each token stands for.
            first: index of the first block among the plan's.

        Returns:
            (B, H, W, C)
        """
        reduction = self(tokens)
        return reduction.restore(refine(reduction, map_size(tokens), blocks, proportional))

    def bind(self, channels: Sequence[int]) -> None:
        """
        Prepare the reducer for the plan's blocks; called once, when a plan is applied to an encoder.

        Args:
            channels: number of channels of each block.

        Raises:
            InputError: where the reducer cannot run in these blocks.
        """

    def relative_to(self, size: tuple[int, int]) -> "Reducer":
        """
        The same reducer with its budget as a share of a map of ``size`` (H, W), for the smaller windows at the map's
        edge.
        """
        return self

    def published_form(self) -> "Reducer":
        """
        The same reducer as its authors' code computes it.

        Raises:
            InputError: for a reducer without a published form.
        """
        raise InputError(f"published=True needs a reducer with a published form, TokenClustering, got {self!r}")

    def describe(self) -> dict[str, Any]:
        """Name and arguments, as plain values."""
        description: dict[str, Any] = {"name": type(self).__name__}
        for parameter in inspect.signature(type(self)).parameters.values():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                value = getattr(self, parameter.name)
                description[parameter.name] = list(value) if isinstance(value, tuple) else value
        return description

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.describe().items() if name != "name")


def refine(
    reduction: Reduction, full: tuple[int, int], blocks: Sequence[nn.Module], proportional: bool = True
) -> Tensor:
    """
    Run blocks on the smaller map of a reduction.

    Args:
        reduction: whose tokens are refined.
        full: (H, W) of the full map.
        blocks, proportional: as for :meth:`Reducer.run`.

    Returns:
        the refined tokens (B, h, w, C).
    """
    refined, sizes, positions, window = reduction.tokens, reduction.sizes, reduction.positions, reduction.window
    if refined.numel() == 0:
        return refined
    if positions is not None and not positions.is_floating_point():
        positions = positions.float()
    place = Place(full, sizes if proportional else None, positions, window)
    for block in blocks:
        refined = block(refined, place)
    return refined


class MergingReducer(Reducer):
    """
    Base class of reducers that merge tokens in each of the plan's blocks, between attention and MLP. After the last
    block the reductions are restored in reverse order.
    """

    on_grid = False
    each_block = True
    takes_lists = True

    def remaining(self, length: int, full: int) -> int:
        """
        Number of tokens after a block.

        Args:
            length: number of tokens before the block.
            full: number of tokens before the plan's first block.
        """
        raise NotImplementedError

    def forward(  # type: ignore[override]  # it acts between the halves of a block
        self, tokens: Tensor, keys: Tensor, sizes: Tensor, positions: Tensor, n: int
    ) -> Reduction:
        """
        Args:
            tokens: (B, h, w, C), after attention.
            keys: (B, h, w, D), keys of that attention, averaged over heads.
            sizes: (B, h, w), how many tokens of the full map each stands for.
            positions: (B, h, w, 2), their centres.
            n: number of tokens after merging, from :meth:`remaining`.

        Returns:
            a reduction to a map (B, 1, n, C), with positions and sizes.
        """
        raise NotImplementedError


class SelectingReducer(Reducer):
    """
    Base class of reducers that select the tokens that each of the plan's blocks runs on; the other tokens pass
    unchanged. In blocks with windows attention runs on all tokens, and only the MLP on the selected ones. In training
    all tokens run, and a mask excludes the others.
    """

    each_block = True
    selects = True
    scopes = ("map",)

    def forward(self, tokens: Tensor, block: int) -> Reduction:  # type: ignore[override]  # anew for each block
        """
        Args:
            tokens: (1, H, W, C), one image, as images may keep different numbers of tokens.
            block: index of the block among the plan's.

        Returns:
            a reduction to the selected tokens (1, 1, n, C), with positions.
        """
        raise NotImplementedError

    def mask(self, tokens: Tensor, block: int) -> Tensor:
        """
        The mask that training uses in place of selecting.

        Args:
            tokens: (B, H, W, C).
            block: as for :meth:`forward`.

        Returns:
            (B, H, W, 1), 1 for a selected token and 0 for another, with a gradient.
        """
        raise NotImplementedError

    def run(self, tokens: Tensor, blocks: Sequence[nn.Module], proportional: bool, first: int = 0) -> Tensor:
        for i, block in enumerate(blocks, start=first):
            if block.training:
                tokens = self._run_masked(i, block, tokens)
            elif block.windowed:
                tokens = self._run_windowed(i, block, tokens)
            else:
                tokens = torch.cat([self._run_selected(i, block, image) for image in tokens.split(1)])
        return tokens

    def _run_masked(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        if block.windowed:
            return block(tokens, Place(map_size(tokens), between=lambda tokens, _: (tokens, self.mask(tokens, i))))
        return block(tokens, Place(map_size(tokens), mask=self.mask(tokens, i)))

    def _run_windowed(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        reductions: list[Reduction] = []

        def select(tokens: Tensor, _: Tensor) -> tuple[Tensor, None]:
            reductions.extend(self(image, i) for image in tokens.split(1))
            return torch.cat([reduction.tokens for reduction in reductions], dim=2), None

        def restore(refined: Tensor) -> Tensor:
            parts = refined.split([reduction.tokens.shape[2] for reduction in reductions], dim=2)
            return torch.cat([reduction.restore(part) for reduction, part in zip(reductions, parts)])

        return block(tokens, Place(map_size(tokens), between=select, restore=restore))

    def _run_selected(self, i: int, block: nn.Module, image: Tensor) -> Tensor:
        reduction = self(image, i)
        return block(reduction.tokens, Place(map_size(image), positions=reduction.positions, restore=reduction.restore))


class GridReducer(Reducer):
    """
    Base class of reducers to a grid of tokens.

    Args:
        grid: (rows, columns) of the smaller map as integers; or, for maps of any size, the share of rows and columns
            that is kept, one float for both or two.

    Raises:
        InputError: for a grid that is neither.
    """

    def __init__(self, grid: Sequence[int | float] | float):
        super().__init__()
        pair: Any = (grid, grid) if isinstance(grid, Real) and not isinstance(grid, Integral) else grid
        if not _is_grid(pair):
            raise InputError(
                f"grid must be (rows, columns), each at least 1, or a share of them in (0, 1], got {grid!r}"
            )
        self.grid: tuple[int | float, ...] = tuple(
            int(side) if isinstance(side, Integral) else float(side) for side in pair
        )

    def cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """
        Rows and columns of the smaller map for a map of ``size`` (H, W).

        Raises:
            InputError: for a grid larger than the map.
        """
        rows, columns = (
            side if isinstance(side, int) else max(1, round(side * length)) for side, length in zip(self.grid, size)
        )
        if rows > size[0] or columns > size[1]:
            raise InputError(
                f"grid {self.grid} is larger than the token map, which has {size[0]} x {size[1]} tokens: "
                "use a smaller grid or a share such as 0.6"
            )
        return rows, columns

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
        and (int(side) >= 1 if isinstance(side, Integral) else isinstance(side, Real) and 0 < float(side) <= 1)
        for side in pair
    )
