"""
Attention in the windows of a Swin's map, the full one or a smaller one. Letters: B batch, H x W tokens of the full map,
h x w of the map at hand, C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hourglass.attention import attend_windows, read_bias, read_bias_at
from hourglass.operators import operator
from hourglass.reduction.reducer import Place
from hourglass.reduction.windows import Strip, join, map_size, pad, split, window_of


class Windows(NamedTuple):
    """
    The windows of a block on the map at hand, each along rows and columns.

    Attributes:
        window: tokens of a window.
        step: original tokens from one token to the next.
        shift: by how many tokens the windows are moved.
        masked_shift: the shift that their mask is made for. The same, but in Expedit's code, where it stays that of the
            full map.
    """

    window: tuple[int, int]
    step: tuple[float, float]
    shift: tuple[int, int]
    masked_shift: tuple[int, int]


class Setting(NamedTuple):
    """
    Of a block's attention.

    Attributes:
        heads: their number.
        window_size: tokens a side of the block's windows.
        shifted: whether the windows are shifted. What the roll then brings together from opposite edges is kept apart.
        published: as in Expedit's code, the bias's table is stretched to the window
            (:func:`hourglass.attention.read_bias`) and the mask of shifted windows stays that of the full map.
        scale: of the scores.
        dropout: share of the attention weights that are dropped.
    """

    heads: int
    window_size: int
    shifted: bool
    published: bool
    scale: float
    dropout: float

    def windows(self, size: tuple[int, int], place: Place) -> Windows:
        """The windows of a map of ``size`` (h, w)."""
        window, step = window_of(size, place.full, self.window_size, place.window)
        shift = (window[0] // 2, window[1] // 2) if self.shifted else (0, 0)
        side = self.window_size // 2
        return Windows(window, step, shift, (side, side) if self.published and self.shifted else shift)


def attend(
    qkv: Tensor, size: tuple[int, int], table: Tensor, place: Place, setting: Setting, fast: bool = False
) -> Tensor:
    """
    Attention between the projections.

    Args:
        qkv: (B, h', w', 3 C), padded and rolled.
        size: (h, w) of the map.
        table: see :func:`hourglass.attention.read_bias`.
        place: of the map's tokens.
        setting: of the block.
        fast: see :func:`hourglass.attention.attend_windows`.

    Returns:
        (B, h, w, C)
    """
    windows = setting.windows(size, place)
    # Only the last row and column of windows hold what the roll moved: the others share one bias.
    counts = [length // side for length, side in zip(map_size(qkv), windows.window)]
    rows, columns = (
        [Strip(count - 1, side), Strip(1, side)] if masked else [Strip(count, side)]
        for count, side, masked in zip(counts, windows.window, windows.masked_shift)
    )
    rows, columns = ([strip for strip in strips if strip.windows] for strips in (rows, columns))
    parts = split(qkv, rows, columns)
    log_sizes: list[Tensor] | list[None] = [None] * len(parts)
    if place.sizes is not None:
        # A padded key is there in the full map too: it stands for as many as a token does on average.
        sizes = pad_and_roll(place.sizes[..., None], windows, value=windows.step[0] * windows.step[1])
        # The size of a centre that no token is near may be 0.
        log_sizes = [part.flatten(1) for part in split(sizes.clamp(min=1e-6).log(), rows, columns)]

    extent = (setting.window_size, setting.window_size)
    if place.positions is None:
        biases = [read_bias(table, extent, windows.window, windows.step, resize=setting.published)] * len(parts)
    else:
        positions = split(_positions_in_windows(place.positions, setting.window_size, windows), rows, columns)
        biases = [read_bias_at(table, extent, window.flatten(1, 2)) for window in positions]
    lasts = [(row is rows[-1], column is columns[-1]) for row in rows for column in columns]
    attended = []
    for part, bias, log_size, last in zip(parts, biases, log_sizes, lasts):
        masks = [masked if is_last else 0 for masked, is_last in zip(windows.masked_shift, last)]
        part_bias = (
            bias.masked_fill(_are_separated(windows.window, masks, bias.device), -torch.inf) if any(masks) else bias
        )
        q, k, v = part.reshape(*part.shape[:1], -1, 3, setting.heads, part.shape[3] // (3 * setting.heads)).permute(
            2, 0, 3, 1, 4
        )
        mixed = attend_windows(q * setting.scale, k, v, part_bias, log_size, setting.dropout, fast)
        attended.append(mixed.transpose(1, 2).reshape(*part.shape[:3], -1))
    result = join(attended, rows, columns)
    if any(windows.shift):
        result = torch.roll(result, windows.shift, dims=(1, 2))
    return result[:, : size[0], : size[1]]


def _positions_in_windows(positions: Tensor, window_size: int, windows: Windows) -> Tensor:
    """(B, h, w, 2) padded and rolled. What fills a cut window lies there as on the regular grid."""
    bottom, right = (-length % side for length, side in zip(map_size(positions), windows.window))
    padded = pad(positions, bottom, right, torch.nan)
    axes = []
    for length, side, step in zip(map_size(padded), windows.window, windows.step):
        index = torch.arange(length, device=padded.device)
        axes.append(index // side * window_size + (index % side + 0.5) * step - 0.5)
    regular = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return pad_and_roll(torch.where(padded.isnan(), regular, padded), windows)


def pad_and_roll(tokens: Tensor, windows: Windows, value: float | Tensor = 0.0) -> Tensor:
    bottom, right = (-length % side for length, side in zip(map_size(tokens), windows.window))
    if bottom or right:
        tokens = pad(tokens, bottom, right, value)
    return torch.roll(tokens, [-shift for shift in windows.shift], dims=(1, 2)) if any(windows.shift) else tokens


def _are_separated(window: tuple[int, int], shift: Sequence[int], device: torch.device) -> Tensor:
    """(wh * ww, wh * ww) True for two tokens of which one is, by either axis, among the last ``shift`` of a window."""
    moved = (torch.arange(side, device=device) >= side - last for side, last in zip(window, shift))
    rows, columns = moved
    region = (2 * rows[:, None].long() + columns).flatten()
    return region[:, None] != region


@operator(
    "Tensor qkv, Tensor zero, Tensor table, Tensor? sizes, Tensor? positions, SymInt[] numbers, float[] factors",
    lambda qkv, *_: [*qkv.shape[:3], qkv.shape[3] // 3],
)
def swin_attention(
    qkv: Tensor,
    zero: Tensor,
    table: Tensor,
    sizes: Tensor | None,
    positions: Tensor | None,
    numbers: list[int],
    factors: list[float],
) -> Tensor:
    """
    Fast attention between the projections. Tokens of zeros, which fill cut windows, join here, projected.

    Args:
        qkv: (B, h, w, 3 C).
        zero: (3 C,), what a token of zeros is projected to.
        numbers: rows and columns of the full map, and of a window on this one (0 where windows shrink as the map
            does); then the whole numbers of a :class:`Setting`.
        factors: its other numbers.

    Returns:
        (B, h, w, C)
    """
    full_h, full_w, window_h, window_w, heads, window_size, shifted, published = numbers
    setting = Setting(heads, window_size, bool(shifted), bool(published), *factors)
    place = Place((full_h, full_w), sizes, positions, (window_h, window_w) if window_h else None)
    size = map_size(qkv)
    return attend(pad_and_roll(qkv, setting.windows(size, place), zero), size, table, place, setting, fast=True)
