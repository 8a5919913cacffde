"""
How a ViT's blocks are run on placed tokens. Letters: B batch, H x W tokens of the full map, h x w of the map at hand,
C channels.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass.attention import RelativeTables, attend, attend_at, read_table, read_table_in_cells, rotate
from hourglass.encoders.contract import Family, PlacedAttention, PlacedBlock, is_plain, key_mean, project, unwrapped
from hourglass.encoders.hourglass import Hourglass
from hourglass.encoders.registry import register
from hourglass.encoders.vit.model import Attention, Block, ViT
from hourglass.operators import operator
from hourglass.reduction.reducer import Place
from hourglass.reduction.windows import grid_positions, map_size, partition, unpartition, window_of


class HourglassViT(Hourglass):
    __doc__ = Hourglass.__doc__


class ViTAttention(PlacedAttention):
    """
    Attention with ``qkv``, ``proj``, ``num_heads`` and, where ``use_rel_pos``, the tables ``rel_pos_h`` and
    ``rel_pos_w`` of decomposed relative positions.
    """

    rel_pos_h: Tensor
    rel_pos_w: Tensor

    def forward(self, tokens: Tensor, place: Place) -> Tensor | tuple[Tensor, Tensor]:
        if place.listed is not None:
            return self._attend_in_list(tokens, place)
        if place.mask is not None:
            return self._attend_to_selected(tokens, place)
        if self.attention_options.keys > 1:
            return self._attend_to_cells(tokens)
        if self.attention_options.fast:
            qkv, zero = self.project(tokens)
            wh, ww = place.window or (0, 0)
            numbers = [self.num_heads, self.attention_options.window_size, *place.full, wh, ww]
            tables = [*(self.tables() or (None, None)), self.frequencies()]
            mixed = _vit_attention(qkv, zero, tables, place.sizes, place.positions, numbers)
            out = self.proj(mixed)
        else:
            size = map_size(tokens)
            reach = _reach(size, place.full, self.attention_options.window_size, place.window)
            windows = self.project_plain(partition(tokens, reach.window))
            mixed = _attend(windows, (self.tables(), self.frequencies()), place, self.num_heads, reach, fast=False)
            out = unpartition(self.proj(mixed), size)
            qkv = windows if place.between is None else unpartition(windows, size)
        return out if place.between is None else (out, key_mean(qkv, self.num_heads))

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values (B, h, w, 3 C) of tokens (B, h, w, C), and those (3 C,) of a token of zeros."""
        return project(self.qkv, tokens)

    def project_plain(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values (B, h, w, 3 C) of tokens (B, h, w, C)."""
        return self.qkv(tokens)

    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Decomposed relative positions along rows and columns (:func:`hourglass.attention.read_table`), if any."""
        return (self.rel_pos_h, self.rel_pos_w) if getattr(self, "use_rel_pos", False) else None

    def frequencies(self) -> Tensor | None:
        """Those of rotary positions (:func:`hourglass.attention.rotate`), if any."""
        return None

    def project_to_cells(self, tokens: Tensor, cell: int) -> tuple[Tensor, Tensor]:
        """
        Queries (B, h, w, C) of tokens (B, h, w, C), and keys and values (B, h', w', 2 C) of the means of their cells:
        the projection is linear, and is made of the means where it is no more than that.
        """
        if type(self).project_plain is ViTAttention.project_plain and is_plain(self.qkv):
            weight, bias = self.qkv.weight, self.qkv.bias
            channels = len(weight) // 3
            of_queries, of_keys = (None, None) if bias is None else (bias[:channels], bias[channels:])
            q = F.linear(tokens, weight[:channels], of_queries)
            return q, F.linear(pool_cells(tokens, cell), weight[channels:], of_keys)
        projected = self.project_plain(tokens)
        channels = projected.shape[-1] // 3
        return projected[..., :channels], pool_cells(projected[..., channels:], cell)

    def _attend_to_cells(self, tokens: Tensor) -> Tensor:
        """Global attention of all tokens of the full map to the means of its cells."""
        q, kv = self.project_to_cells(tokens, self.attention_options.keys)
        tables = [*(self.tables() or (None, None)), self.frequencies()]
        numbers = [self.num_heads, self.attention_options.keys, int(self.attention_options.fast)]
        return self.proj(_cell_attention(q, kv, tables, numbers))

    def _attend_in_list(self, tokens: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """On a list of tokens that lie anywhere."""
        assert place.listed is not None and place.positions is not None, "a list has positions"
        windows, lengths = place.listed
        qkv, zero = self.project(tokens)
        keys = key_mean(qkv, self.num_heads)
        side = self.attention_options.window_size
        if side == 0:
            sizes = None if place.sizes is None else place.sizes[:, 0]
            mixed = self._attend_at(qkv[:, 0], sizes, place.positions[:, 0], place.full)[:, None]
            return self.proj(mixed), keys
        sizes_of: list[Tensor] | list[None] = [None] * len(lengths)
        if place.sizes is not None:
            sizes_of = windows.split(place.sizes[..., None], lengths)
        cells = windows.flatten(grid_positions(place.full, tokens.device)[None])
        parts = []
        for part, size, positions, cell, shape in zip(
            windows.split(qkv, lengths),
            sizes_of,
            windows.split(place.positions, lengths),
            windows.split(cells, windows.lengths),
            windows.shapes,
        ):
            length = part.shape[1]
            # Positions in the window: its first cell is (0, 0).
            positions = (positions.unflatten(0, (-1, len(cell))) - cell[:, :1]).flatten(0, 1)
            # Tokens of zeros fill cut windows in the full map: they stay, where they lie beyond the edge.
            beyond = _cells_beyond(shape, side, positions)
            part = torch.cat([part, zero.expand(len(part), len(beyond), -1)], dim=1)
            positions = torch.cat([positions, beyond.expand(len(positions), -1, -1)], dim=1)
            size = None if size is None else F.pad(size[..., 0], (0, len(beyond)), value=1.0)
            parts.append(self._attend_at(part, size, positions, (side, side))[:, :length])
        return self.proj(windows.join(parts)), keys

    def _attend_at(self, qkv: Tensor, sizes: Tensor | None, positions: Tensor, extent: tuple[int, int]) -> Tensor:
        """(B, L, 3 C), sizes (B, L) and positions (B, L, 2) -> (B, L, C)"""
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        log_sizes = None if sizes is None else sizes.clamp(min=1e-6).log()
        tables, frequencies = self.tables(), self.frequencies()
        if frequencies is not None:
            q, k = (rotate(x, positions[:, None], frequencies) for x in (q, k))
        relative = None if tables is None else RelativeTables(*tables, extent)
        mixed = attend_at(q, k, v, relative, positions, log_sizes, self.attention_options.fast)
        return mixed.transpose(1, 2).flatten(2)

    def _attend_to_selected(self, tokens: Tensor, place: Place) -> Tensor:
        """
        Global attention to the tokens of the mask only, with a gradient of the mask: values and weights of the others
        are multiplied by 0, and what is left is normalised again.
        """
        tables, frequencies, size = self.tables(), self.frequencies(), map_size(tokens)
        rel_h = rel_w = None
        if tables is not None:
            rel_h, rel_w = (read_table(table, side, side, 1) for table, side in zip(tables, size))
        qkv = self.project_plain(tokens)
        q, k, v = qkv.unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        if frequencies is not None:
            positions = grid_positions(size, qkv.device)
            q, k = (rotate(x, positions, frequencies) for x in (q, k))
        assert place.mask is not None
        mask = place.mask[:, None].expand(-1, self.num_heads, -1, -1, -1).to(v.dtype)
        masked = torch.cat([v * mask, mask], dim=-1)
        mixed = attend(q, k, masked, rel_h, rel_w, fast=self.attention_options.fast).float()
        mixed = (mixed[..., :-1] / mixed[..., -1:].clamp(min=1e-6)).to(v.dtype)
        return self.proj(mixed.permute(0, 2, 3, 1, 4).flatten(3))


def pool_cells(tokens: Tensor, cell: int) -> Tensor:
    """
    The means of cells of ``cell`` x ``cell`` tokens, at the edge of what is left: (B, h, w, C) -> (B, h', w', C).
    """
    pooled = F.avg_pool2d(tokens.permute(0, 3, 1, 2), cell, ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1)


def _cells_beyond(shape: tuple[int, int], side: int, like: Tensor) -> Tensor:
    """(m, 2) the cells of a window that are not among its first ``shape`` rows and columns."""
    (height, width), cells = shape, torch.arange(side, device=like.device, dtype=like.dtype)
    return torch.cat([torch.cartesian_prod(cells[:height], cells[width:]), torch.cartesian_prod(cells[height:], cells)])


class ViTBlock(PlacedBlock):
    attention = ViTAttention


@register
class ViTFamily(Family):
    """ViTDet's, and those built alike."""

    name = "ViT"
    known: tuple[type, ...] = (ViT, Block, Attention)
    class_names: tuple[str, ...] = ("ViT", "ImageEncoderViT")
    parts = (*Family.parts, "window_size")
    pools_keys = True
    block = ViTBlock
    hourglass = HourglassViT

    def stages(self, encoder: nn.Module) -> list[list[nn.Module]] | None:
        blocks = getattr(encoder, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            return None
        return [list(blocks)] if all(self.fits(unwrapped(block)) for block in blocks) else None

    def window_size(self, block: Any) -> int:
        return unwrapped(block).window_size


@operator("Tensor q, Tensor kv, Tensor?[] tables, SymInt[] numbers", lambda q, *_: list(q.shape))
def _cell_attention(q: Tensor, kv: Tensor, tables: list[Tensor | None], numbers: list[int]) -> Tensor:
    """
    Attention to the cells of the full map.

    Args:
        q: (B, H, W, C).
        kv: (B, h, w, 2 C), keys and values of the cells.
        tables: of rows and of columns, and frequencies, see :class:`ViTAttention`.
        numbers: heads, rows and columns of a cell, and whether fast.

    Returns:
        (B, H, W, C)
    """
    heads, cell, fast = numbers
    size, cells = map_size(q), map_size(kv)
    counts = [torch.full((n,), float(cell), device=q.device) for n in cells]
    for count, length in zip(counts, size):
        count[-1] = length - cell * (len(count) - 1)
    log_sizes = rel_h = rel_w = None
    if any(length % cell for length in size):  # else all cells are of one size, which the softmax takes no notice of
        log_sizes = (counts[0][:, None] * counts[1]).log().expand(len(q), -1, -1)
    rows, columns, frequencies = tables
    if rows is not None and columns is not None:
        rel_h, rel_w = (read_table_in_cells(*axis, cell) for axis in zip((rows, columns), size))
    query = q.unflatten(3, (heads, -1)).permute(0, 3, 1, 2, 4)
    key, value = kv.unflatten(3, (2, heads, -1)).permute(3, 0, 4, 1, 2, 5)
    if frequencies is not None:
        centres = [torch.arange(len(n), device=q.device) * cell + (n - 1) / 2 for n in counts]
        query = rotate(query, grid_positions(size, q.device), frequencies)
        key = rotate(key, torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1), frequencies)
    return attend(query, key, value, rel_h, rel_w, log_sizes, bool(fast)).permute(0, 2, 3, 1, 4).flatten(3)


class _Reach(NamedTuple):
    """
    Where attention looks: the window of the map at hand, the original tokens that it covers, and their number
    from one of its tokens to the next, each along rows and columns.
    """

    window: tuple[int, int]
    extent: tuple[int, int]
    step: tuple[float, float]


def _reach(size: tuple[int, int], full: tuple[int, int], window_size: int, window: tuple[int, int] | None) -> _Reach:
    if window_size == 0:
        return _Reach(size, full, (1.0, 1.0) if size == full else (full[0] / size[0], full[1] / size[1]))
    window, step = window_of(size, full, window_size, window)
    return _Reach(window, (window_size, window_size), step)


@operator(
    "Tensor qkv, Tensor zero, Tensor?[] tables, Tensor? sizes, Tensor? positions, SymInt[] numbers",
    lambda qkv, *_: [*qkv.shape[:3], qkv.shape[3] // 3],
)
def _vit_attention(
    qkv: Tensor,
    zero: Tensor,
    tables: list[Tensor | None],
    sizes: Tensor | None,
    positions: Tensor | None,
    numbers: list[int],
) -> Tensor:
    """
    Fast attention between the projections. Tokens of zeros, which fill cut windows, join here, projected: nothing is
    spent on projecting them.

    Args:
        qkv: (B, h, w, 3 C).
        zero: (3 C,), what a token of zeros is projected to.
        tables: of rows and of columns, and frequencies, see :class:`ViTAttention`.
        numbers: heads; tokens a side of a window; rows and columns of the full map, and of a window on this one (0
            where windows shrink as the map does).

    Returns:
        (B, h, w, C)
    """
    heads, window_size, full_h, full_w, window_h, window_w = numbers
    size = map_size(qkv)
    reach = _reach(size, (full_h, full_w), window_size, (window_h, window_w) if window_h else None)
    place = Place((full_h, full_w), sizes, positions)
    windows = partition(qkv, reach.window, zero)
    relative = None if tables[0] is None or tables[1] is None else (tables[0], tables[1])
    return unpartition(_attend(windows, (relative, tables[2]), place, heads, reach, fast=True), size)


def _attend(
    qkv: Tensor,
    tables: tuple[tuple[Tensor, Tensor] | None, Tensor | None],
    place: Place,
    heads: int,
    reach: _Reach,
    fast: bool,
) -> Tensor:
    """
    Args:
        qkv: (B * n, wh, ww, 3 C), of windows.
        tables: of rows and columns, and frequencies, see :class:`ViTAttention`.
        place: of the map's tokens; its sizes and positions are read.

    Returns:
        (B * n, wh, ww, C)
    """
    count, (h, w) = qkv.shape[0], map_size(qkv)
    sizes, positions = place.sizes, place.positions
    relative_tables, frequencies = tables
    log_sizes = rel_h = rel_w = None
    if relative_tables is not None and positions is None:
        rel_h, rel_w = (read_table(*axis) for axis in zip(relative_tables, reach.extent, reach.window, reach.step))
    positions = None if positions is None else _positions_in_windows(positions, reach)
    if sizes is not None:
        # A padded key is there in the full map too: it stands for as many as a token does on average.
        sizes = partition(sizes[..., None], reach.window, value=reach.step[0] * reach.step[1])[..., 0]
        # The size of a centre that no token is near may be 0, and a window may hold only such.
        log_sizes = sizes.clamp(min=1e-6).log()
    q, k, v = qkv.reshape(count, h, w, 3, heads, -1).permute(3, 0, 4, 1, 2, 5)
    if frequencies is not None:
        places = _regular_positions(reach, qkv.device)[None] if positions is None else positions
        q, k = (rotate(x, places[:, None], frequencies) for x in (q, k))
    if positions is None:
        mixed = attend(q, k, v, rel_h, rel_w, log_sizes, fast)
    else:
        q, k, v, positions = (x.flatten(-3, -2) for x in (q, k, v, positions))
        log_sizes = None if log_sizes is None else log_sizes.flatten(1)
        relative = None if relative_tables is None else RelativeTables(*relative_tables, reach.extent)
        mixed = attend_at(q, k, v, relative, positions, log_sizes, fast).unflatten(2, (h, w))
    return mixed.permute(0, 2, 3, 1, 4).reshape(count, h, w, -1)


def _positions_in_windows(positions: Tensor, reach: _Reach) -> Tensor:
    """
    Positions in the map (B, h, w, 2) -> in its windows (B * n, wh, ww, 2), of which each covers ``reach.extent``
    original tokens. What fills a cut window lies there as on the regular grid.
    """
    axes = []
    for length, side, extent in zip(map_size(positions), reach.window, reach.extent):
        axes.append(torch.arange(length, device=positions.device) // side * extent)
    local = positions - torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    local = partition(local, reach.window, value=torch.nan)
    return torch.where(local.isnan(), _regular_positions(reach, positions.device), local)


def _regular_positions(reach: _Reach, device: torch.device) -> Tensor:
    """(wh, ww, 2) where the tokens of a window lie that are on the regular grid."""
    axes = [(torch.arange(side, device=device) + 0.5) * step - 0.5 for side, step in zip(reach.window, reach.step)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
