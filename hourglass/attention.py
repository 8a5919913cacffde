"""
Attention with relative positions, on maps whose tokens may stand for several and may lie apart by more than one
original token: decomposed positions (MViTv2, arXiv 2112.01526, as ViTDet uses them) and the bias of a window's
attention (Swin, arXiv 2103.14030).

Each comes as the plain formula, which materialises the scores of all pairs, and fast, with the same result to float32's
rounding, in one of two ways (measured in benchmarks/README.md):

- in chunks, on CPUs: the plain formula on so few scores at a time that they stay in the caches. No backward pass.
- fused, on CUDA and for gradients: torch's fused attention. Decomposed positions are part of its dot products: the
  query gets its scores with all rows and columns appended, and the key its own row and column, one-hot.

Letters: B batch (or batch x windows), N heads, h x w tokens, L = h w, C channels a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass.operators import is_exporting, is_symbolic, needs_gradient

# Scores of a chunk on CPUs: in float32 2 MiB, which a core's cache holds next to keys and values.
CHUNK = 1 << 19
# The same in an exported program, which has each chunk's steps one after the other: 8 MiB, of fewer steps.
EXPORTED_CHUNK = CHUNK * 4


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """
    Rotary positions (RoFormer, arXiv 2104.09864) of two axes: each pair of neighbouring channels is turned by an angle
    that grows with the row, in the first half of the channels, and with the column, in the second.

    Args:
        x: (..., C), queries or keys.
        positions: (..., 2), rows and columns of the tokens.
        frequencies: (2, C / 4), radians from one row, and from one column, to the next.

    Returns:
        (..., C)
    """
    angles = (positions[..., None].to(frequencies.dtype) * frequencies).flatten(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def resize_table(table: Tensor, extent: int) -> Tensor:
    """
    Resize a table of relative positions linearly to the distances of ``extent`` tokens, as Detectron2 does.

    Args:
        table: (rows, C), a row for each distance.
        extent: number of tokens along the axis.

    Returns:
        (2 * extent - 1, C)
    """
    rows = 2 * extent - 1
    if not is_symbolic(rows) and table.shape[0] == rows:  # to the same size, resizing is the identity
        return table
    return F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T


def read_table(table: Tensor, extent: int, length: int, step: float) -> Tensor:
    """
    Read a table of relative positions for ``length`` tokens that lie ``step`` original tokens apart.

    Args:
        table: (rows, C), resized to ``2 * extent - 1`` rows where it has another number.
        extent: number of original tokens along the axis; distances are clamped to less.
        length: number of tokens along the axis.
        step: distance of two neighbours in original tokens. Between two rows the reading is linear.

    Returns:
        (length, length, C): entry (q, k) is the embedding of the distance from key k to query q.
    """
    table = resize_table(table, extent)
    index = torch.arange(length, device=table.device)
    distance = index[:, None] - index[None, :]
    if step == 1:
        return table[(distance + extent - 1).clamp(0, 2 * extent - 2)]
    row = (distance * step + (extent - 1)).clamp(0, 2 * extent - 2)
    below = row.floor().long()
    above = (below + 1).clamp(max=2 * extent - 2)
    fraction = (row - below).to(table.dtype)[..., None]
    return torch.lerp(table[below], table[above], fraction)


def read_table_in_cells(table: Tensor, length: int, cell: int) -> Tensor:
    """
    A table of relative positions for ``length`` tokens as queries and cells of ``cell`` tokens as keys; the last cell
    may have fewer tokens.

    Args:
        table: as for :func:`read_table`.

    Returns:
        (length, cells, C): the mean over the cell's tokens, which is the embedding's part in their mean score.
    """
    embeddings = read_table(table, length, length, 1)
    return torch.stack([keys.mean(dim=1) for keys in embeddings.split(cell, dim=1)], dim=1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    log_sizes: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """
    Softmax attention. The relative positions see the query as it is, the content its ``C ** -0.5``.

    Args:
        q: (B, N, h, w, C).
        k: (B, N, h', w', C), h' x w' being h x w or the cells of a coarser grid.
        v: (B, N, h', w', D).
        rel_h: (h, h', C) embeddings along the rows, from :func:`read_table` or :func:`read_table_in_cells`.
        rel_w: (w, w', C) embeddings along the columns.
        log_sizes: (B, h', w'), added to the score of each key: proportional attention (ToMe, arXiv 2210.09461).
        fast: use the fast implementation instead of the plain formula.

    Returns:
        (B, N, h, w, D)
    """
    batch, heads, h, w, channels = q.shape
    rows_of_keys, columns_of_keys = k.shape[2:4]
    number = rows_of_keys * columns_of_keys
    if not fast:
        scores = (q.flatten(2, 3) * channels**-0.5) @ k.flatten(2, 3).transpose(-2, -1)
        if rel_h is not None and rel_w is not None:
            rows, columns = _relative_scores(q, rel_h, rel_w)
            scores = scores.view(batch, heads, h, w, rows_of_keys, columns_of_keys)
            scores = scores + rows[..., :, None] + columns[..., None, :]
        scores = scores.view(batch, heads, h * w, number)
        if log_sizes is not None:
            scores = scores + log_sizes.reshape(batch, 1, 1, number).to(scores.dtype)
        return (scores.softmax(dim=-1) @ v.flatten(2, 3)).unflatten(2, (h, w))
    if rel_h is None or rel_w is None:
        bias = None if log_sizes is None else log_sizes.reshape(batch, 1, 1, number).to(q.dtype)
        mixed = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), bias)
        return mixed.unflatten(2, (h, w))
    attend_fast = _attend_chunked if _in_chunks(q, k, v, rel_h, rel_w) else _attend_folded
    return attend_fast(q, k, v, rel_h, rel_w, log_sizes)


class RelativeTables(NamedTuple):
    """
    Decomposed relative positions of ``extent`` original tokens.

    Attributes:
        rows, columns: (number, C) embeddings of the distances along rows, and along columns, resized to
            ``2 * extent - 1``.
        extent: rows and columns of the original tokens.
    """

    rows: Tensor
    columns: Tensor
    extent: tuple[int, int]


def attend_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: RelativeTables | None,
    positions: Tensor,
    log_sizes: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """
    :func:`attend` for tokens at any positions. Tables are read at the distance of query and key, linearly between two
    rows, where the keys lie in no more rows (and columns) than the original tokens: at whole positions, say, or on any
    grid. Else a key is, in linear shares, in the two original rows that it lies between.

    Args:
        q, k, v: (B, N, L, C).
        tables: None: no relative positions.
        positions: (B, L, 2), rows and columns of the tokens, from 0 to extent - 1.
        log_sizes: (B, L), added to the score of each key.
        fast: use the fast implementation instead of the plain formula.

    Returns:
        (B, N, L, C)
    """
    scale = q.shape[-1] ** -0.5
    queries, keys = [q * scale], [k]
    if tables is not None:
        for table, extent, place in zip((tables.rows, tables.columns), tables.extent, positions.unbind(-1)):
            lines, shares = _lines(place, extent)
            queries.append(_scores_with_lines(q, resize_table(table, extent).to(q.dtype), extent, place, lines))
            keys.append(shares.to(k.dtype)[:, None].expand(-1, q.shape[1], -1, -1))
    if log_sizes is not None:
        queries.append(torch.ones_like(q[..., :1]))
        keys.append(log_sizes[:, None, :, None].to(k.dtype).expand(*k.shape[:3], 1))
    query, key = torch.cat(queries, dim=-1), torch.cat(keys, dim=-1)
    if not fast:
        return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ v
    if _in_chunks(query, key, v):
        return _attend_in_chunks(query, key, v)
    return _fused(query, key, v)


def _lines(place: Tensor, extent: int) -> tuple[Tensor, Tensor]:
    """The ``extent`` rows, or columns, (B, m) that keys at ``place`` (B, L) are in, and their shares (B, L, m)."""
    ordered = place.sort(dim=1).values
    number = F.pad(ordered.diff(dim=1) != 0, (1, 0)).cumsum(1)
    lines_suffice = number[:, -1:] < extent
    original_lines = torch.arange(extent, device=place.device, dtype=place.dtype).expand(len(place), -1)
    occupied_lines = torch.full_like(original_lines, -extent)  # where no key is
    occupied_lines = occupied_lines.scatter(1, number.clamp(max=extent - 1), ordered)
    lines = torch.where(lines_suffice, occupied_lines, original_lines)
    apart = (place[..., None] - lines[:, None]).abs()
    return lines, torch.where(lines_suffice[..., None], (apart == 0).to(place.dtype), (1 - apart).clamp(min=0))


def _scores_with_lines(q: Tensor, table: Tensor, extent: int, place: Tensor, lines: Tensor) -> Tensor:
    """
    The scores of each query (B, N, L, C) at ``place`` (B, L) with the rows, or columns, ``lines`` (B, m): (B, N, L, m),
    from their embeddings by distance (2 extent - 1, C).
    """
    by_distance = q @ table.T
    entry = place[..., None] - lines[:, None] + (extent - 1)
    entry = entry.clamp(0, 2 * extent - 2)[:, None].expand(-1, q.shape[1], -1, -1)
    below = entry.floor().long()
    above = (below + 1).clamp(max=2 * extent - 2)
    return torch.lerp(by_distance.gather(-1, below), by_distance.gather(-1, above), (entry - below).to(q.dtype))


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    log_sizes: Tensor | None = None,
    dropout: float = 0.0,
    fast: bool = False,
) -> Tensor:
    """
    Softmax attention in windows with a bias.

    Args:
        q, k, v: (B, N, L, C), B windows; the queries are scaled already.
        bias: (N, L, L), or (B, N, L, L) where windows do not share it, added to the scores; -inf keeps a query from a
            key.
        log_sizes: (B, L), added to the score of each key.
        dropout: share of the attention weights that are dropped.
        fast: the fast way in place of the plain formula.

    Returns:
        (B, N, L, C)
    """
    if fast and dropout == 0:
        if bias.dim() == 4 and (q.is_cuda or not needs_gradient(q, k, v, bias)):
            bias = bias if log_sizes is None else bias + log_sizes[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)
        if bias.dim() == 3 and _in_chunks(q, k, v, bias):
            return _attend_windows_chunked(q, k, v, bias.to(q.dtype), log_sizes)
        if bias.dim() == 3 and q.is_cuda:  # elsewhere fused attention has no gradient of the bias
            return _attend_windows_fused(q, k, v, bias.to(q.dtype), log_sizes)
    scores = q @ k.transpose(-2, -1) + bias
    if log_sizes is not None:
        scores = scores + log_sizes[:, None, None].to(scores.dtype)
    # Under autocast the bias, and with it the scores, are float32 and the values are not.
    return F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype) @ v


def _in_chunks(*tensors: Tensor) -> bool:
    if is_symbolic(*(size for tensor in tensors for size in tensor.shape)):
        return False  # how many chunks is not known
    # A trace, by which operations are counted, has those of the formula on any device.
    return not needs_gradient(*tensors) and (tensors[0].device.type == "cpu" or torch.jit.is_tracing())


def _relative_scores(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, h, w, C) -> the scores of each query with all rows (B, N, h, w, h') and all columns (B, N, h, w, w')."""
    rows = torch.einsum("bnhwc,hkc->bnhwk", q, rel_h.to(q.dtype))
    columns = torch.einsum("bnhwc,wkc->bnhwk", q, rel_w.to(q.dtype))
    return rows, columns


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, start: Callable[[slice, slice, slice], Tensor] | None = None
) -> Tensor:
    """
    Args:
        q, k: (B, N, L, C) and (B, N, L', C), the scores are their dot products.
        v: (B, N, L', D).
        start: what scores are added to, a tensor of its own for some of the batch, heads and queries: (b, n, l, L').
            None: 0.

    Returns:
        (B, N, L, D), laid out as (B, L, N, D).
    """
    batch, heads, number, channels = v.shape
    length = q.shape[2]
    chunk = CHUNK
    if torch.jit.is_tracing():
        chunk = CHUNK * 64  # a trace of fewer steps
    elif is_exporting():
        chunk = EXPORTED_CHUNK
    queries = max(1, min(length, chunk // number))
    heads_at_once = max(1, min(heads, chunk // (queries * number)))
    images_at_once = max(1, min(batch, chunk // (heads_at_once * queries * number))) if heads_at_once == heads else 1

    def attend_to(b: slice, n: slice, keys: Tensor, values: Tensor, i: slice) -> Tensor:
        part = q[b, n, i]
        shape = part.shape[:3]
        part = part.reshape(-1, *part.shape[2:])
        if start is None:
            scores = torch.bmm(part, keys)
        else:
            scores = start(b, n, i).view(*part.shape[:2], number).baddbmm_(part, keys)
        return torch.bmm(torch.softmax(scores, -1), values).view(*shape, channels)

    # A program has no memory to write to: it joins what it has.
    out = None if is_exporting() else q.new_empty(batch, length, heads, channels)
    of_images = []
    for b in _slices(batch, images_at_once):
        of_heads = []
        for n in _slices(heads, heads_at_once):
            keys = k[b, n].reshape(-1, number, k.shape[3]).transpose(1, 2)
            values = v[b, n].reshape(-1, number, channels)
            of_queries = []
            for i in _slices(length, queries):
                mixed = attend_to(b, n, keys, values, i)
                if out is None:
                    of_queries.append(mixed)
                else:
                    out[b, i, n] = mixed.transpose(1, 2)
            of_heads.append(of_queries)
        of_images.append(of_heads)
    if out is not None:
        return out.transpose(1, 2)
    return torch.cat([torch.cat([torch.cat(parts, dim=2) for parts in chunks], dim=1) for chunks in of_images])


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, length, step)]


def _attend_chunked(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, log_sizes: Tensor | None) -> Tensor:
    """:func:`attend` in chunks."""
    batch, heads, h, w, channels = q.shape
    rows, columns = (scores.flatten(2, 3) for scores in _relative_scores(q, rel_h, rel_w))
    sizes = None if log_sizes is None else log_sizes.to(q.dtype)[:, None, None]

    def start(b: slice, n: slice, i: slice) -> Tensor:
        scores = rows[b, n, i, :, None] + columns[b, n, i, None, :]
        if sizes is not None:
            scores += sizes[b]
        return scores.flatten(3)

    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return _attend_in_chunks(q * channels**-0.5, k, v, start).unflatten(2, (h, w))


def _attend_folded(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, log_sizes: Tensor | None) -> Tensor:
    """:func:`attend` by torch's fused attention."""
    batch, heads, h, w, channels = q.shape
    h_keys, w_keys = k.shape[2:4]
    row, column = (torch.eye(side, dtype=q.dtype, device=q.device) for side in (h_keys, w_keys))
    queries = [q * channels**-0.5, *_relative_scores(q, rel_h, rel_w)]
    keys = [k, row[:, None].expand(*k.shape[:4], h_keys), column.expand(*k.shape[:4], w_keys)]
    if log_sizes is not None:
        queries.append(torch.ones_like(q[..., :1]))
        keys.append(log_sizes[:, None, ..., None].to(k.dtype).expand(*k.shape[:4], 1))
    query, key = (torch.cat(parts, dim=-1).flatten(2, 3) for parts in (queries, keys))
    return _fused(query, key, v.flatten(2, 3)).unflatten(2, (h, w))


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch's fused attention without a scale, for values (B, N, L, C) of fewer channels than queries and keys."""
    channels, wide = v.shape[-1], q.shape[-1]
    aligned = 0 if is_symbolic(wide) else -wide % 8
    if aligned:
        q, k = F.pad(q, (0, aligned)), F.pad(k, (0, aligned))
    # Flash attention takes values as wide as keys, up to 256; memory-efficient attention, which CUDA has too, any.
    if (not q.is_cuda and not is_exporting()) or (q.dtype != torch.float32 and wide + aligned <= 256 and bias is None):
        v = F.pad(v, (0, wide + aligned - channels))
    return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)[..., :channels]


def _attend_windows_chunked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, log_sizes: Tensor | None) -> Tensor:
    """:func:`attend_windows` in chunks."""
    if log_sizes is None:
        return F.scaled_dot_product_attention(q, k, v, bias[None], scale=1.0)
    sizes = log_sizes.to(q.dtype)[:, None, None]
    return _attend_in_chunks(q, k, v, lambda b, n, i: bias[n, i] + sizes[b])


def _attend_windows_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, log_sizes: Tensor | None) -> Tensor:
    """:func:`attend_windows` by torch's fused attention."""
    bias = bias.expand(len(q), -1, -1, -1)
    if log_sizes is None:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    # A channel more holds the sizes, so that windows still share the bias.
    sizes = log_sizes[:, None, :, None].to(k.dtype).expand(*k.shape[:3], 1)
    query, key = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1), torch.cat([k, sizes], dim=-1)
    return _fused(query, key, v, bias)


def read_bias(
    table: Tensor, extent: tuple[int, int], size: tuple[int, int], step: tuple[float, float], resize: bool = False
) -> Tensor:
    """
    The relative position bias of a window, from a table for windows of ``extent`` tokens.

    Args:
        table: (rows * columns, N), an entry for each pair of a vertical and a horizontal distance, with
            ``2 * extent - 1`` of them along an axis.
        extent: rows and columns of the table's window.
        size: (h, w) of the window at hand.
        step: distance of neighbouring tokens in original tokens, along rows and columns. Between entries of the
            table the reading is bilinear; distances over the table's are clamped.
        resize: stretch the table to the window's ``2 * size - 1`` distances in place of reading it at the true ones,
            as Expedit's code does. Its outermost entries then stand for distances that no pair has.

    Returns:
        (N, h * w, h * w): entry (q, k) is added to the score of key k for query q.
    """
    grid = table.T.unflatten(1, (2 * extent[0] - 1, 2 * extent[1] - 1))
    distances = (2 * size[0] - 1, 2 * size[1] - 1)
    if resize:
        grid = F.interpolate(grid[None], size=distances, mode="bilinear", align_corners=False)[0]
    else:
        for axis in (0, 1):
            grid = _at_distances(grid, axis + 1, extent[axis], size[axis], step[axis])
    return grid.flatten(1)[:, bias_index(size, table.device)]


def read_bias_at(table: Tensor, extent: tuple[int, int], positions: Tensor) -> Tensor:
    """
    :func:`read_bias` for tokens at any positions; between entries of the table the reading is bilinear.

    Args:
        table, extent: as there.
        positions: (B, L, 2), rows and columns of the tokens, in original ones.

    Returns:
        (B, N, L, L)
    """
    most = 2 * torch.tensor(extent, device=positions.device) - 2
    entry = positions[:, :, None] - positions[:, None] + most / 2
    entry = torch.minimum(entry.clamp(min=0), most)
    below = entry.floor().long()
    above = torch.minimum(below + 1, most)
    fraction = (entry - below).to(table.dtype)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return table[row * (2 * extent[1] - 1) + column]

    (top, left), (bottom, right) = below.unbind(-1), above.unbind(-1)
    down, across = (share[..., None] for share in fraction.unbind(-1))
    upper = torch.lerp(at(top, left), at(top, right), across)
    lower = torch.lerp(at(bottom, left), at(bottom, right), across)
    return torch.lerp(upper, lower, down).permute(0, 3, 1, 2)


def bias_index(size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """
    Where the bias table of a window has the entry of a query and a key: (h * w, h * w) int64, for ``size`` (h, w) and a
    table of ``(2 * h - 1) * (2 * w - 1)`` entries.
    """
    h, w = size
    row, column = (torch.arange(length, device=device) for length in size)
    row = row[:, None, None, None] - row[None, None, :, None] + h - 1
    column = column[None, :, None, None] - column[None, None, None, :] + w - 1
    return (row * (2 * w - 1) + column).reshape(h * w, h * w)


def _at_distances(grid: Tensor, axis: int, extent: int, length: int, step: float) -> Tensor:
    """The entries of ``length`` tokens' distances along an axis that has those of ``extent`` tokens."""
    if step == 1 and length == extent:
        return grid
    distance = torch.arange(1 - length, length, device=grid.device) * step
    entry = (distance + (extent - 1)).clamp(0, 2 * extent - 2)
    below = entry.floor().long()
    above = (below + 1).clamp(max=2 * extent - 2)
    fraction = (entry - below).to(grid.dtype).view([-1 if i == axis else 1 for i in range(grid.dim())])
    return torch.lerp(grid.index_select(axis, below), grid.index_select(axis, above), fraction)
