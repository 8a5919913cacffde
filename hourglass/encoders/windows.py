"""Windows of a token map. Letters: B batch, H x W tokens, C channels, n windows an image, wh x ww tokens a window."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass.operators import operator
from hourglass.reduction import MergingReducer, Reducer, Reduction
from hourglass.reduction.reducer import map_size


def partition(tokens: Tensor, window: tuple[int, int], value: float | Tensor = 0.0) -> Tensor:
    """
    Cut a map into windows that do not overlap, padded at the bottom and the right where it is no multiple of them.

    Args:
        tokens: (B, H, W, C).
        window: (wh, ww), rows and columns of a window.
        value: what the padding holds, a number or (C,).

    Returns:
        (B * n, wh, ww, C)
    """
    batch, channels = tokens.shape[0], tokens.shape[3]
    height, width = map_size(tokens)
    wh, ww = window
    bottom, right = -height % wh, -width % ww
    if bottom or right:
        tokens = pad(tokens, bottom, right, value)
    rows, columns = (height + bottom) // wh, (width + right) // ww
    tokens = tokens.reshape(batch, rows, wh, columns, ww, channels)
    return tokens.transpose(2, 3).reshape(-1, wh, ww, channels)


def pad(tokens: Tensor, bottom: int, right: int, value: float | Tensor = 0.0) -> Tensor:
    """(B, H, W, C) -> (B, H + bottom, W + right, C), filled with ``value``, a number or (C,)."""
    height, width = map_size(tokens)
    if not isinstance(value, Tensor):
        return F.pad(tokens, (0, 0, 0, right, 0, bottom), value=value)
    tokens = F.pad(tokens, (0, 0, 0, right, 0, bottom))
    value = value.to(tokens.dtype)
    tokens[:, height:] = value
    tokens[:, :, width:] = value
    return tokens


def unpartition(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Put the windows of :func:`partition` back together and drop the padding.

    Args:
        windows: (B * n, wh, ww, C).
        size: (H, W) of the map.

    Returns:
        (B, H, W, C)
    """
    _, wh, ww, channels = windows.shape
    height, width = size
    rows, columns = -(-height // wh), -(-width // ww)
    tokens = windows.reshape(-1, rows, columns, wh, ww, channels).transpose(2, 3)
    return tokens.reshape(-1, rows * wh, columns * ww, channels)[:, :height, :width]


def window_of(
    size: tuple[int, int], full: tuple[int, int], window_size: int, window: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[float, float]]:
    """
    The windows on a map of ``size`` (h, w) that stands for one of ``full`` (H, W), where they have ``window_size``
    tokens a side: rows and columns of one, ``window`` or shrunk as the map is, and how many original tokens apart
    its tokens lie, along rows and columns.
    """
    if window is not None:
        return window, (window_size / window[0], window_size / window[1])
    step = (full[0] / size[0], full[1] / size[1])
    return tuple(max(1, round(window_size / apart)) for apart in step), step


class Strip(NamedTuple):
    """Neighbouring windows of the same length along an axis."""

    windows: int
    side: int  # tokens of a window

    @property
    def length(self) -> int:
        return self.windows * self.side


def strips(length: int, window: int) -> list[Strip]:
    """An axis of ``length`` tokens in windows: the whole ones, and one that the edge cuts off."""
    both = [Strip(length // window, window), Strip(1, length % window)]
    return [strip for strip in both if strip.length > 0]


def split(tokens: Tensor, rows: list[Strip], columns: list[Strip]) -> list[Tensor]:
    """(B, H, W, C) to the windows of each strip of rows and columns: (B * n, side, side, C)."""
    parts, top = [], 0
    for row in rows:
        left = 0
        for column in columns:
            parts.append(_windows_of_strip(tokens, top, left, *row, *column))
            left += column.length
        top += row.length
    return parts


@operator(
    "Tensor tokens, SymInt top, SymInt left, SymInt rows, SymInt wh, SymInt columns, SymInt ww",
    lambda tokens, top, left, rows, wh, columns, ww: [tokens.shape[0] * rows * columns, wh, ww, tokens.shape[3]],
)
def _windows_of_strip(tokens: Tensor, top: int, left: int, rows: int, wh: int, columns: int, ww: int) -> Tensor:
    return partition(tokens[:, top : top + rows * wh, left : left + columns * ww], (wh, ww))


def join(windows: list[Tensor], rows: list[Strip], columns: list[Strip]) -> Tensor:
    """The way back of :func:`split`."""
    return _join(windows, _numbers(rows), _numbers(columns))


def _numbers(strips: list[Strip]) -> list[int]:
    """An operator takes no tuples."""
    return [value for strip in strips for value in strip]


def _joined_shape(windows: list[Tensor], rows: list[int], columns: list[int]) -> list:
    height, width = (sum(n * side for n, side in zip(axis[::2], axis[1::2])) for axis in (rows, columns))
    return [windows[0].shape[0] // (rows[0] * columns[0]), height, width, windows[0].shape[3]]


@operator("Tensor[] windows, SymInt[] rows, SymInt[] columns", _joined_shape)
def _join(windows: list[Tensor], rows: list[int], columns: list[int]) -> Tensor:
    heights, widths = ([n * side for n, side in zip(axis[::2], axis[1::2])] for axis in (rows, columns))
    parts = iter(windows)
    return torch.cat(
        [torch.cat([unpartition(next(parts), (height, width)) for width in widths], dim=2) for height in heights],
        dim=1,
    )


class EachWindow(Reducer):
    """
    Reduces each window of a map on its own and puts the results together to a smaller map. Windows that the map's edge
    cuts off are reduced as they are: no padding joins the tokens.

    Args:
        reducer: of a window.
        window: tokens a side.
        pad: fill the windows at the edge with zeros and reduce those along, as Expedit's code does.
    """

    def __init__(self, reducer: Reducer, window: int, pad: bool = False):
        super().__init__()
        self.reducer = reducer.relative_to((window, window))
        self.window = window
        self.pad = pad

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
            sizes = [reduction.sizes[..., None] for reduction in reductions]
            sizes = join(sizes, smaller_rows, smaller_columns)[..., 0]
        if reductions[0].positions is not None:
            positions = join([reduction.positions for reduction in reductions], smaller_rows, smaller_columns)
            positions = _in_map(positions, _numbers(smaller_rows), _numbers(smaller_columns), self.window)
        reduced = join([reduction.tokens for reduction in reductions], smaller_rows, smaller_columns)
        return Reduction(reduced, positions, sizes, restore)


@operator("Tensor positions, SymInt[] rows, SymInt[] columns, int window", lambda positions, *_: list(positions.shape))
def _in_map(positions: Tensor, rows: list[int], columns: list[int], window: int) -> Tensor:
    """
    Positions in windows to those in the map, (B, h, w, 2).

    Args:
        rows, columns: number and side of the windows of each strip, on the smaller map.
        window: tokens a side on the full map.
    """
    starts = []
    for axis in (rows, columns):
        sides = torch.tensor([side for n, side in zip(axis[::2], axis[1::2]) for _ in range(n)])
        starts.append((window * torch.arange(len(sides))).repeat_interleave(sides).to(positions.device))
    return positions + torch.stack(torch.meshgrid(*starts, indexing="ij"), dim=-1)


class WindowList:
    """
    The tokens of a map as a list, window after window: those of the whole windows first, then of those that the map's
    edge cuts off. Unlike those of a map, windows of a list can lose any number of tokens.

    Args:
        size: (H, W) of the map.
        window: rows and columns of a window.
    """

    def __init__(self, size: tuple[int, int], window: tuple[int, int]):
        self.rows, self.columns = (strips(length, side) for length, side in zip(size, window))
        kinds = [(row, column) for row in self.rows for column in self.columns]
        #: (rows, columns) of each kind of windows, whole or cut.
        self.shapes = [(row.side, column.side) for row, column in kinds]
        #: How many windows there are of each kind.
        self.counts = [row.windows * column.windows for row, column in kinds]
        #: How many tokens each window of a kind has in the map.
        self.lengths = [height * width for height, width in self.shapes]

    def flatten(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 1, H * W, C)"""
        return self.join([part.flatten(1, 2) for part in split(tokens, self.rows, self.columns)])

    def unflatten(self, tokens: Tensor) -> Tensor:
        """The way back of :meth:`flatten`."""
        parts = self.split(tokens, self.lengths)
        return join([part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)], self.rows, self.columns)

    def split(self, tokens: Tensor, lengths: list[int]) -> list[Tensor]:
        """A list (B, 1, L, C) whose windows have ``lengths`` tokens -> (B * n, tokens, C), the windows of each kind."""
        parts = tokens[:, 0].split([count * length for count, length in zip(self.counts, lengths)], dim=1)
        return [part.reshape(-1, length, part.shape[2]) for part, length in zip(parts, lengths)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The way back of :meth:`split`."""
        batch = len(parts[0]) // self.counts[0]
        return torch.cat([part.reshape(batch, 1, -1, part.shape[2]) for part in parts], dim=2)


class MergeEachWindow(Reducer):
    """
    Merges the tokens of each window on their own.

    Args:
        reducer: of a window.
    """

    each_block = True

    def __init__(self, reducer: MergingReducer):
        super().__init__()
        self.reducer = reducer

    def left(self, windows: WindowList, lengths: list[int]) -> list[int]:
        """How many tokens windows of each kind have after merging, of ``lengths``."""
        return [self.reducer.left(length, full) for length, full in zip(lengths, windows.lengths)]

    def forward(
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
        left = self.left(windows, lengths)
        parts = zip(*(windows.split(x, lengths) for x in (tokens, keys, sizes[..., None], positions)), left)
        reductions = [
            self.reducer(part[:, None], key[:, None], size[:, None, :, 0], position[:, None], n)
            for part, key, size, position, n in parts
        ]

        def restore(refined: Tensor) -> Tensor:
            refined = [part[:, None] for part in windows.split(refined, left)]
            return windows.join([one.restore(part)[:, 0] for one, part in zip(reductions, refined)])

        return Reduction(
            windows.join([one.tokens[:, 0] for one in reductions]),
            windows.join([one.positions[:, 0] for one in reductions]),
            windows.join([one.sizes[:, 0, :, None] for one in reductions])[..., 0],
            restore,
        )
