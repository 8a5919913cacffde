"""
Tokens that merge with others, whole, and the way back. Letters: B batch, L tokens, n merged tokens, C channels.
"""

import torch
from torch import Tensor


def merge(tokens: Tensor, labels: Tensor, n: int, weights: Tensor | None = None) -> Tensor:
    """
    Replace tokens that share a label by their mean.

    Args:
        tokens: (B, L, C).
        labels: (B, L) int64, the merged token that each joins, in [0, n).
        weights: (B, L), of the tokens in the mean; None: equal.

    Returns:
        (B, n, C). A merged token that no token joins is 0.
    """
    exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    weights = torch.ones_like(exact[..., :1]) if weights is None else weights.to(exact.dtype)[..., None]
    sums = _sum_by_label(torch.cat([exact * weights, weights], dim=-1), labels, n)
    return (sums[..., :-1] / sums[..., -1:].clamp(min=1e-30)).to(tokens.dtype)


def merge_sizes(sizes: Tensor, labels: Tensor, n: int) -> Tensor:
    """How many tokens the merged ones (B, n) stand for, where the tokens stand for ``sizes`` (B, L)."""
    return _sum_by_label(sizes[..., None], labels, n)[..., 0]


def _sum_by_label(values: Tensor, labels: Tensor, n: int) -> Tensor:
    """(B, L, C) -> (B, n, C)"""
    batch, _, channels = values.shape
    places = labels + n * torch.arange(batch, device=labels.device)[:, None]
    sums = values.new_zeros(batch * n, channels)
    return sums.index_add(0, places.flatten(), values.flatten(0, 1)).view(batch, n, channels)


def unmerge(merged: Tensor, labels: Tensor) -> Tensor:
    """Give every token what it merged into: (B, n, C) and labels (B, L) -> (B, L, C)."""
    return merged.gather(1, labels[..., None].expand(-1, -1, merged.shape[-1]))


def restore_merged(tokens: Tensor, merged: Tensor, labels: Tensor, restore_mode: str, refined: Tensor) -> Tensor:
    """
    Give every token the result of what it merged into.

    Args:
        tokens: (B, L, C), as they were.
        merged: (B, n, C), what they became.
        labels: (B, L).
        restore_mode: "update": a token keeps its features and gets the change; "features": it gets the features.
        refined: (B, n, C), the result.

    Returns:
        (B, L, C)
    """
    if restore_mode == "update":
        return tokens + unmerge(refined - merged, labels)
    return unmerge(refined, labels)
