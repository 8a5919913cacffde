"""
Attention with relative positions, on maps whose tokens may stand for several and may lie apart by more than one
original token: decomposed positions (MViTv2, arXiv 2112.01526, as ViTDet uses them) and the bias of a window's
attention (Swin, arXiv 2103.14030).

Letters: B batch (or batch x windows), N heads, h x w tokens, C channels a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    if table.shape[0] == rows:
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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    log_sizes: Tensor | None = None,
) -> Tensor:
    """
    Softmax attention. The relative positions see the query as it is, the content its ``C ** -0.5``.

    Args:
        q, k, v: (B, N, h, w, C).
        rel_h: (h, h, C) embeddings along the rows, from :func:`read_table`.
        rel_w: (w, w, C) embeddings along the columns.
        log_sizes: (B, h, w), added to the score of each key: proportional attention (ToMe, arXiv 2210.09461).

    Returns:
        (B, N, h, w, C)
    """
    batch, heads, h, w, channels = q.shape
    queries, keys, values = (x.reshape(batch * heads, h * w, channels) for x in (q, k, v))
    scores = (queries * channels**-0.5) @ keys.transpose(-2, -1)
    if rel_h is not None:
        grid = queries.view(batch * heads, h, w, channels)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, rel_h.to(q.dtype))
        columns = torch.einsum("bhwc,wkc->bhwk", grid, rel_w.to(q.dtype))
        scores = scores.view(batch * heads, h, w, h, w) + rows[..., :, None] + columns[..., None, :]
    if log_sizes is not None:
        scores = scores.view(batch, heads, h * w, h * w) + log_sizes.reshape(batch, 1, 1, h * w).to(scores.dtype)
    scores = scores.view(batch * heads, h * w, h * w)
    return (scores.softmax(dim=-1) @ values).view(batch, heads, h, w, channels)


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
