"""The reducers as their formulas say, slowly: loops over tokens, in float64."""

import math

import torch
from torch import Tensor


def density_peaks(features: Tensor, n: int, k: int) -> tuple[list[int], list[int]]:
    """
    Density peaks with k nearest neighbours of tokens (L, C): the representative that each token joins, counted from 0,
    and the representatives in rising order.
    """
    points = features.double().tolist()
    length = len(points)
    distance = [[math.dist(a, b) for b in points] for a in points]
    density = []
    for i in range(length):
        others = sorted(distance[i][j] ** 2 for j in range(length) if j != i)[:k]
        density.append(-sum(others) / len(others) if others else 0.0)  # the logarithm of rho
    peaks = []
    for i in range(length):
        denser = [j for j in range(length) if (density[j], -j) > (density[i], -i)]
        delta = min(distance[i][j] for j in denser) if denser else max(distance[i])
        peaks.append(density[i] + (math.log(delta) if delta > 0 else -math.inf))
    chosen = sorted(sorted(range(length), key=lambda i: (-peaks[i], i))[:n])
    labels = [
        chosen.index(i) if i in chosen else min(range(n), key=lambda c: (distance[i][chosen[c]], c))
        for i in range(length)
    ]
    return labels, chosen


def bipartite_matching(metric: Tensor, r: int, class_token: bool = False) -> list[int]:
    """What each of the tokens (L, D) is in after merging, in the order of ``hourglass.reduction.matching``."""
    points = [[value / max(math.hypot(*point), 1e-12) for value in point] for point in metric.double().tolist()]
    a, b = list(range(0, len(points), 2)), list(range(1, len(points), 2))
    r = min(r, (len(points) - int(class_token)) // 2)
    best = {}
    for i in a:
        if i == 0 and class_token:
            continue
        similar = [sum(x * y for x, y in zip(points[i], points[j])) for j in b]
        best[i] = max(similar, default=-math.inf), b[similar.index(max(similar))] if b else None
    ranked = sorted(best, key=lambda i: (-best[i][0], i))
    merged, left = ranked[:r], ranked[r:]
    if class_token:
        left = [0, *sorted(left)]
    order = left + b
    return [order.index(best[i][1] if i in merged else i) for i in range(len(points))]


def merged(tokens: Tensor, labels: list[int], weights: list[float]) -> list[list[float]]:
    """The weighted means of the tokens (L, C) of each label."""
    means = []
    for label in range(max(labels) + 1):
        members = [i for i, other in enumerate(labels) if other == label]
        weight = sum(weights[i] for i in members)
        means.append([sum(weights[i] * float(tokens[i, c]) for i in members) / weight for c in range(tokens.shape[1])])
    return means


def attention(
    attn: torch.nn.Module, tokens: Tensor, positions: Tensor, sizes: Tensor, extent: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """
    Attention with decomposed relative positions of tokens (L, C), one pair at a time, and the keys in the mean over
    heads. A key between two rows is in both, in linear shares.
    """
    q, k, v = attn.qkv(tokens).view(len(tokens), 3, attn.num_heads, -1).unbind(1)
    out = torch.zeros_like(q)
    for head in range(attn.num_heads):
        for i in range(len(tokens)):
            scores = []
            for j in range(len(tokens)):
                score = q[i, head] @ k[j, head] * q.shape[-1] ** -0.5 + sizes[j].log()
                for axis, table in enumerate((attn.rel_pos_h, attn.rel_pos_w)):
                    place = float(positions[j, axis])
                    for line in {math.floor(place), math.ceil(place)}:
                        share = 1 - abs(place - line)
                        score = score + share * (
                            q[i, head] @ _read(table, float(positions[i, axis]) - line, extent[axis])
                        )
                scores.append(score)
            out[i, head] = torch.stack(scores).softmax(0) @ v[:, head]
    return attn.proj(out.flatten(1)), k.mean(1)


def _read(table: Tensor, distance: float, extent: int) -> Tensor:
    """The embedding of a distance, between two rows of the table linearly."""
    row = distance + extent - 1
    below, above = math.floor(row), math.ceil(row)
    return table[below] if below == above else (above - row) * table[below] + (row - below) * table[above]
