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
    merged, remaining = ranked[:r], ranked[r:]
    if class_token:
        remaining = [0, *sorted(remaining)]
    order = remaining + b
    return [order.index(best[i][1] if i in merged else i) for i in range(len(points))]


def merged(tokens: Tensor, labels: list[int], weights: list[float]) -> list[list[float]]:
    """The weighted means of the tokens (L, C) of each label."""
    means = []
    for label in range(max(labels) + 1):
        members = [i for i, value in enumerate(labels) if value == label]
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


def merge_line(features: list[list[float]], sizes: list[float], target: int) -> list[int]:
    """The token that each of a line becomes a part of; see :func:`hourglass.reduction.lines.merge_lines`."""
    members = [[i] for i in range(len(features))]
    while len(members) > target:
        means = [_mean(features, sizes, group) for group in members]
        weights = [sum(sizes[i] for i in group) for group in members]

        def cost(a: int, b: int, means=means, weights=weights) -> float:
            if not 0 <= b < len(means):
                return float("inf")
            square = sum((x - y) ** 2 for x, y in zip(means[a], means[b]))
            return square * weights[a] * weights[b] / (weights[a] + weights[b])

        movers = range(0, len(members), 2)
        nearer = {i: i - 1 if cost(i, i - 1) < cost(i, i + 1) else i + 1 for i in movers}
        number = min(len(members) - target, len(members) // 2)
        for i in sorted(movers, key=lambda i: cost(i, nearer[i]))[:number]:
            members[nearer[i]] = members[nearer[i]] + members[i]
            members[i] = []
        members = [group for group in members if group]
    return [next(j for j, group in enumerate(members) if i in group) for i in range(len(features))]


def _mean(features: list[list[float]], sizes: list[float], group: list[int]) -> list[float]:
    total = sum(sizes[i] for i in group)
    return [sum(features[i][c] * sizes[i] for i in group) / total for c in range(len(features[0]))]


def merge_grid(tokens: list[list[list[float]]], grid: tuple[int, int], turns: int) -> list[list[int]]:
    """The number of the token of the smaller map that each merges into; rows and columns take turns."""
    height, width = len(tokens), len(tokens[0])
    cells = [[[(y, x)] for x in range(width)] for y in range(height)]

    def mean(cell: list[tuple[int, int]]) -> list[float]:
        return [sum(tokens[y][x][c] for y, x in cell) / len(cell) for c in range(len(tokens[0][0]))]

    def merged(line: list[list[tuple[int, int]]], target: int) -> list[list[tuple[int, int]]]:
        labels = merge_line([mean(cell) for cell in line], [float(len(cell)) for cell in line], target)
        return [[place for cell, j in zip(line, labels) if j == i for place in cell] for i in range(target)]

    for turn in range(1, turns + 1):
        columns = width - round((width - grid[1]) * turn / turns)
        rows = height - round((height - grid[0]) * turn / turns)
        cells = [merged(row, columns) for row in cells]
        cells = [list(row) for row in zip(*(merged(list(column), rows) for column in zip(*cells)))]
    labels = [[0] * width for _ in range(height)]
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            for y, x in cell:
                labels[y][x] = i * grid[1] + j
    return labels
