"""What a reducer is applied to: the whole map, or each attention window."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass.errors import InputError
from hourglass.operators import operator
from hourglass.reduction.reducer import GridReducer, MergingReducer, Place, Reducer, Reduction
from hourglass.reduction.windows import Strip, WindowList, grid_positions, join, map_size, numbers, split, strips


def in_scope(reducer: Reducer, window: int | None, pad: bool = False, like: Tensor | None = None) -> Reducer:
    """
    A reducer that applies another to the whole map, or to each of its windows.

    Args:
        reducer: stays as it is.
        window: tokens a side; None: the whole map.
        pad: fill the windows at the map's edge with zeros and reduce these too, as Expedit's code does.
        like: (C,), a tensor of the tokens' device and dtype; None: float32 on the CPU, 8 channels.

    Raises:
        InputError: where the reducer does not fit the window.
    """
    if isinstance(reducer, MergingReducer):
        return MergeEachWindow(reducer, window)
    return reducer if window is None else EachWindow(reducer, window, pad, like)


class EachWindow(Reducer):
    """
    Reduces each window of a map on its own and puts the results together to a smaller map. Windows that the map's edge
    cuts off are reduced as they are: no padding joins the tokens.

    Args:
        reducer: of a window.
        window: tokens a side.
        pad: fill the windows at the edge with zeros and reduce those along, as Expedit's code does.
        like: see :func:`in_scope`.
    """

    reducer: Reducer

    def __init__(self, reducer: Reducer, window: int, pad: bool = False, like: Tensor | None = None):
        super().__init__()
        self.reducer = reducer.relative_to((window, window))
        self.window = window
        self.pad = pad
        #: Rows and columns of the smaller window.
        self.cells = _smaller_window(reducer, (window, window), like)

    def extra_repr(self) -> str:
        return f"window={self.window}, pad={self.pad}"

    def forward(self, tokens: Tensor) -> Reduction:
        size = map_size(tokens)
        if self.pad:
            tokens = F.pad(tokens, (0, 0, 0, -size[1] % self.window, 0, -size[0] % self.window))
        rows, columns = (strips(length, self.window) for length in map_size(tokens))
        reductions = [self.reducer(windows) for windows in split(tokens, rows, columns)]
        sides = [map_size(reduction.tokens) for reduction in reductions]
        smaller_rows = [Strip(row.windows, side[0]) for row, side in zip(rows, sides[:: len(columns)])]
        smaller_columns = [Strip(column.windows, side[1]) for column, side in zip(columns, sides)]

        def restore(refined: Tensor) -> Tensor:
            windows = split(refined, smaller_rows, smaller_columns)
            tokens = join([reduction.restore(part) for reduction, part in zip(reductions, windows)], rows, columns)
            return tokens[:, : size[0], : size[1]]

        sizes = positions = None
        if reductions[0].sizes is not None:
            sizes_of = [reduction.sizes[..., None] for reduction in reductions if reduction.sizes is not None]
            sizes = join(sizes_of, smaller_rows, smaller_columns)[..., 0]
        if reductions[0].positions is not None:
            places = [reduction.positions for reduction in reductions if reduction.positions is not None]
            positions = join(places, smaller_rows, smaller_columns)
            positions = _positions_in_map(positions, numbers(smaller_rows), numbers(smaller_columns), self.window)
        reduced = join([reduction.tokens for reduction in reductions], smaller_rows, smaller_columns)
        return Reduction(reduced, positions, sizes, restore, self.cells)


@operator("Tensor positions, SymInt[] rows, SymInt[] columns, int window", lambda positions, *_: list(positions.shape))
def _positions_in_map(positions: Tensor, rows: list[int], columns: list[int], window: int) -> Tensor:
    """
    Positions in windows to those in the map, (B, h, w, 2).

    Args:
        rows, columns: number and side of the windows of each strip, on the smaller map.
        window: tokens a side on the full map.
    """
    starts = []
    for axis in (rows, columns):
        first, of_strips = 0, []
        for n, side in zip(axis[::2], axis[1::2]):
            of_windows = window * (first + torch.arange(n, device=positions.device))
            of_strips.append(of_windows[:, None].expand(-1, side).flatten())
            first = first + n
        starts.append(torch.cat(of_strips))
    return positions + torch.stack(torch.meshgrid(*starts, indexing="ij"), dim=-1)


class MergeEachWindow(Reducer):
    """
    Merges tokens in each of the plan's blocks, in each window on its own or in the whole map.

    Args:
        reducer: of a window, or of the map.
        window: tokens a side; None: the whole map.
    """

    each_block = True

    reducer: MergingReducer

    def __init__(self, reducer: MergingReducer, window: int | None):
        super().__init__()
        self.reducer = reducer if window is None else cast(MergingReducer, reducer.relative_to((window, window)))
        self.window = window

    def run(self, tokens: Tensor, blocks: Sequence[nn.Module], proportional: bool, first: int = 0) -> Tensor:
        full = map_size(tokens)
        windows = WindowList(full, full if self.window is None else (self.window, self.window))
        positions = grid_positions(full, tokens.device).float().expand(len(tokens), -1, -1, -1)
        tokens, positions = windows.flatten(tokens), windows.flatten(positions)
        merging = _Merging(self, windows, windows.lengths, torch.ones_like(positions[..., 0]), positions)
        restores = []
        for block in blocks:
            tokens = block(tokens, merging.place(full, proportional))
            merging, restore = merging.after()
            restores.append(restore)
        for restore in reversed(restores):
            tokens = restore(tokens)
        return windows.unflatten(tokens)

    def remaining(self, windows: WindowList, lengths: list[int]) -> list[int]:
        """How many tokens windows of each kind have after merging, of ``lengths``."""
        return [self.reducer.remaining(length, full) for length, full in zip(lengths, windows.lengths)]

    def forward(  # type: ignore[override]  # between the halves of a block, as MergingReducer
        self, tokens: Tensor, keys: Tensor, sizes: Tensor, positions: Tensor, windows: WindowList, lengths: list[int]
    ) -> Reduction:
        """
        Args:
            tokens, keys, positions: (B, 1, L, ...), lists.
            sizes: (B, 1, L).
            windows: what the lists are of.
            lengths: how many tokens windows of each kind have.

        Returns:
            a reduction to a shorter list.
        """
        remaining = self.remaining(windows, lengths)
        parts = zip(*(windows.split(x, lengths) for x in (tokens, keys, sizes[..., None], positions)), remaining)
        reductions = [
            self.reducer(part[:, None], key[:, None], size[:, None, :, 0], position[:, None], n)
            for part, key, size, position, n in parts
        ]

        def restore(refined: Tensor) -> Tensor:
            pairs = zip(reductions, windows.split(refined, remaining))
            return windows.join([reduction.restore(part[:, None])[:, 0] for reduction, part in pairs])

        return Reduction(
            windows.join([reduction.tokens[:, 0] for reduction in reductions]),
            windows.join([reduction.positions[:, 0] for reduction in reductions]),
            windows.join([reduction.sizes[:, 0, :, None] for reduction in reductions])[..., 0],
            restore,
        )


class _Merging:
    """
    The tokens that one block merges.

    Args:
        reducer: merges them.
        windows, lengths: what the list is of, and how many tokens windows of each kind have.
        sizes: (B, 1, L).
        positions: (B, 1, L, 2).
    """

    def __init__(
        self, reducer: MergeEachWindow, windows: WindowList, lengths: list[int], sizes: Tensor, positions: Tensor
    ):
        self.reducer = reducer
        self.windows, self.lengths = windows, lengths
        self.sizes, self.positions = sizes, positions
        self._reduction: Reduction | None = None

    def place(self, full: tuple[int, int], proportional: bool) -> Place:
        listed = (self.windows, self.lengths)
        return Place(full, self.sizes if proportional else None, self.positions, listed=listed, between=self._merge)

    def _merge(self, tokens: Tensor, keys: Tensor) -> tuple[Tensor, None]:
        # A pass that is recomputed for its gradients merges again, to the same.
        self._reduction = self.reducer(tokens, keys, self.sizes, self.positions, self.windows, self.lengths)
        return self._reduction.tokens, None

    def after(self) -> tuple["_Merging", Callable[[Tensor], Tensor]]:
        """The tokens that the next block merges, and the way back from those to these."""
        reduction, remaining = self._reduction, self.reducer.remaining(self.windows, self.lengths)
        assert reduction is not None, "a block calls what acts between its halves"
        assert reduction.sizes is not None and reduction.positions is not None, "what merges tells sizes and positions"
        return _Merging(self.reducer, self.windows, remaining, reduction.sizes, reduction.positions), reduction.restore


def _smaller_window(reducer: Reducer, size: tuple[int, int], like: Tensor | None) -> tuple[int, int]:
    """Rows and columns that a window of ``size`` is reduced to."""
    if isinstance(reducer, GridReducer):
        return reducer.cells(size)
    (rows, columns), *cut = (
        map_size(probe(reducer, part, like).tokens)
        for part in (size, (max(1, size[0] - 1), size[1]), (size[0], max(1, size[1] - 1)))
    )
    if cut[0][1] != columns or cut[1][0] != rows:
        raise InputError(
            f"{type(reducer).__name__} makes {rows} x {columns} tokens of a window of {size[0]} x {size[1]}, and "
            f"{cut[0][0]} x {cut[0][1]} of one that the map's edge cuts to {size[0] - 1} x {size[1]}: the number of "
            "rows that it makes must depend on the rows alone, and that of columns on the columns"
        )
    return rows, columns


def probe(reducer: Reducer, size: tuple[int, int], like: Tensor | None) -> Reduction:
    """What a reducer makes of a random map of ``size``; ``like`` as for :func:`in_scope`."""
    like = torch.zeros(8) if like is None else like
    with torch.no_grad():
        return reducer(torch.randn(1, *size, len(like), generator=torch.Generator().manual_seed(0)).to(like))
