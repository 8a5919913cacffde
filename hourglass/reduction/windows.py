"""Windows of a token map. Letters: B batch, H x W tokens, C channels, n windows an image, wh x ww tokens a window."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass.operators import is_exporting, operator


def map_size(tokens: Tensor) -> tuple[int, int]:
    """(H, W) of a map (B, H, W, C), as plain numbers under tracing too; an exported program may leave them open."""
    if is_exporting():
        return tokens.shape[1], tokens.shape[2]
    return int(tokens.shape[1]), int(tokens.shape[2])


def grid_positions(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H, W, 2) row and column of each token of a map."""
    return torch.stack(torch.meshgrid(*(torch.arange(side, device=device) for side in size), indexing="ij"), dim=-1)


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
    if size == full:
        return (window_size, window_size), (1.0, 1.0)
    step = (full[0] / size[0], full[1] / size[1])
    rows, columns = (max(1, round(window_size / apart)) for apart in step)
    return (rows, columns), step


class Strip(NamedTuple):
    """Neighbouring windows of the same length along an axis."""

    windows: int
    side: int  # tokens of a window

    @property
    def length(self) -> int:
        return self.windows * self.side


def strips(length: int, window: int) -> list[Strip]:
    """An axis of ``length`` tokens in windows: the whole ones, and one that the edge cuts off."""
    candidates = [Strip(length // window, window), Strip(1, length % window)]
    return [strip for strip in candidates if strip.length > 0]


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
    return _join(windows, numbers(rows), numbers(columns))


def numbers(strips: list[Strip]) -> list[int]:
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
