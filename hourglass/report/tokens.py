"""The tokens of a plan, over an image."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from hourglass.encoders import Plan, find_encoder
from hourglass.encoders.registry import family_of
from hourglass.encoders.visiting import visiting
from hourglass.reduction import Reducer, Reduction
from hourglass.reduction.calibrated import Calibrated
from hourglass.reduction.scope import EachWindow, MergeEachWindow
from hourglass.reduction.windows import WindowList, map_size

WHITE, ORANGE = (255, 255, 255), (255, 120, 0)
# Pixels of a picture for a token, and how long the longer side of a picture may be.
CELL, SIDES = 10, (800, 1600)


def find_clusters(reduced: Tensor, reduction: Reduction) -> Tensor:
    """
    Which token of the smaller map each token gets most of its result from: restoring is linear in what the blocks
    changed, so that changing one token of the smaller map at a time shows where it goes.

    Args:
        reduced: (1, H, W, C), what was reduced.
        reduction: to h x w tokens.

    Returns:
        (H, W) int64, in [0, h * w).
    """
    numbers = torch.arange(reduction.tokens.shape[1] * reduction.tokens.shape[2])
    return _find_largest(reduced, reduction, numbers)


def find_clusters_in_windows(reduced: Tensor, reduction: Reduction, reducer: EachWindow) -> Tensor:
    """:func:`find_clusters` of a reducer of windows, the tokens of all of which are changed at a time."""
    width = map_size(reduction.tokens)[1]
    cells = [torch.arange(side) for side in map_size(reduction.tokens)]
    inside = [axis % side for axis, side in zip(cells, reducer.cells)]
    local = _find_largest(reduced, reduction, (inside[0][:, None] * reducer.cells[1] + inside[1]).flatten())
    windows = [torch.arange(side, device=local.device) // reducer.window for side in map_size(reduced)]
    rows = windows[0][:, None] * reducer.cells[0] + local // reducer.cells[1]
    columns = windows[1] * reducer.cells[1] + local % reducer.cells[1]
    return rows * width + columns


def _find_largest(reduced: Tensor, reduction: Reduction, numbers: Tensor) -> Tensor:
    """
    The number whose tokens of the smaller map each token gets most of its result from.

    Args:
        reduced, reduction: as for :func:`find_clusters`.
        numbers: (h * w,) int64 of the smaller map's tokens, from 0.

    Returns:
        (H, W) int64.
    """
    tokens = reduction.tokens
    channels, numbers = reduced.shape[-1], numbers.to(tokens.device)
    still = reduction.restore(tokens)[0]
    most = torch.full_like(still[..., 0], -torch.inf)
    labels = torch.zeros(most.shape, dtype=torch.int64, device=tokens.device)
    for first in range(0, int(numbers.max()) + 1, channels):
        # A channel for each of the next numbers.
        change = (numbers[:, None] == first + torch.arange(channels, device=tokens.device)).to(tokens.dtype)
        moved = reduction.restore(tokens + change.view(tokens.shape))[0]
        share, source = (moved - still).max(dim=-1)
        better = share > most
        most = torch.where(better, share, most)
        labels = torch.where(better, first + source, labels)
    return labels


def borders(labels: np.ndarray) -> np.ndarray:
    """(H, W) integers -> (H, W) bool: where a pixel's left or upper neighbour has another one."""
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    return border


def draw_clusters(picture: np.ndarray, labels: np.ndarray, patch: int) -> np.ndarray:
    """The picture with the borders between tokens of different clusters; a token is ``patch`` pixels a side."""
    cells = np.kron(labels, np.ones((patch, patch), labels.dtype))[: picture.shape[0], : picture.shape[1]]
    border = borders(cells)
    picture = picture.copy()
    picture[border] = (0.5 * picture[border] + 0.5 * np.array(WHITE)).astype(np.uint8)
    return picture


class _Seen(Exception):
    """What the first of the plan's stages runs on is seen, and what follows is not needed."""


class Tokens(NamedTuple):
    """
    What a plan makes of an image's tokens before its first block.

    Attributes:
        full: (H, W) tokens of the map, the padding's among them.
        labels: (H, W) int64, the cluster of each token; None where a reducer makes no clusters.
        merged: whether the clusters are those that the blocks have merged, after the last one.
        selected: (H, W) bool, the tokens that the first block runs on; None where it runs on all or on clusters.
        window: tokens a side of the first block's attention windows; 0: it has none.
        cell: height and width of a token in pixels of the model's input.
        size: (height, width) of the input without its padding.
        running: how many tokens run.
        blocks: the first and the last of the blocks that they run in.
    """

    full: tuple[int, int]
    labels: np.ndarray | None
    merged: bool
    selected: np.ndarray | None
    window: int
    cell: tuple[float, float]
    size: tuple[int, int]
    running: int
    blocks: tuple[int, int]


def find_tokens(view: nn.Module, plan: Plan, inputs: dict[str, Any]) -> Tokens | None:
    """
    Run an expedited model on one image, up to the plan's blocks, and see what these run on. Of a plan that goes over
    several stages, in the first.

    Args:
        view: the expedited model.
        plan: its plan.
        inputs: of one image, with "image" (C, height, width).

    Returns:
        None for a plan without a reducer.

    Raises:
        InputError: where the model does not come to the plan's blocks.
    """
    if plan.reducer is None:
        return None
    encoder = find_encoder(view)[1]
    family = family_of(encoder)
    looks: list[tuple[tuple[int, int], int, int, Any]] = []
    shapes: list[torch.Size] = []

    def visit(first: int, tokens: Tensor, blocks: Sequence[nn.Module], reducer: Reducer) -> Tensor:
        window = family.window_size(blocks[0])
        looks.append((map_size(tokens), window, len(blocks), _find_labels(tokens, blocks, reducer, plan.proportional)))
        raise _Seen

    handle = encoder.register_forward_pre_hook(lambda module, arguments: shapes.append(arguments[0].shape))
    try:
        with contextlib.suppress(_Seen), visiting(view, visit) as run:
            run([inputs])
    finally:
        handle.remove()
    full, window, blocks, (labels, selected, running) = looks[0]
    height, width = shapes[0][-2:]
    return Tokens(
        full,
        labels,
        plan.reducer.each_block,
        selected,
        window,
        (height / full[0], width / full[1]),
        tuple(inputs["image"].shape[-2:]),
        running,
        (plan.start, plan.start + blocks - 1),
    )


def _find_labels(
    tokens: Tensor, blocks: Sequence[nn.Module], reducer: Reducer, proportional: bool
) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """Labels of clusters, the selected tokens, and how many run."""
    size = map_size(tokens)
    if isinstance(reducer, Calibrated):  # what it adds is no part of a token's cluster
        reducer = reducer.reducer
    if reducer.selects:
        selection = _select(reducer, tokens, blocks, proportional)
        if selection.positions is None:
            return None, None, int(np.prod(map_size(selection.tokens)))
        selected = np.zeros(size, bool)
        rows, columns = selection.positions.reshape(-1, 2).round().long().cpu().numpy().T
        selected[rows, columns] = True
        return None, selected, int(selected.sum())
    if isinstance(reducer, MergeEachWindow):
        reduction = _merge(reducer, tokens, blocks, proportional)
    elif reducer.each_block:
        return None, None, size[0] * size[1]
    else:
        reduction = reducer(tokens)
    if not reduction.tokens.numel():
        return None, None, 0
    rows, columns = map_size(reduction.tokens)
    if isinstance(reducer, EachWindow):
        labels = find_clusters_in_windows(tokens, reduction, reducer)
    else:
        labels = find_clusters(tokens, reduction)
    return labels.cpu().numpy(), None, rows * columns


def _select(reducer: Reducer, tokens: Tensor, blocks: Sequence[nn.Module], proportional: bool) -> Reduction:
    """What the first block selects: with windows, of what its attention gives."""
    selections: list[Reduction] = []
    handle = reducer.register_forward_hook(lambda _, arguments, selection: selections.append(selection))
    try:
        reducer.run(tokens, blocks[:1], proportional)
    finally:
        handle.remove()
    return selections[0]


def _merge(reducer: MergeEachWindow, tokens: Tensor, blocks: Sequence[nn.Module], proportional: bool) -> Reduction:
    """What the plan's blocks have merged after the last one, as one reduction."""
    merges: list[tuple[WindowList, Reduction]] = []
    handle = reducer.register_forward_hook(lambda _, arguments, reduction: merges.append((arguments[4], reduction)))
    try:
        reducer.run(tokens, blocks, proportional)
    finally:
        handle.remove()

    def restore(refined: Tensor) -> Tensor:
        for _, reduction in reversed(merges):
            refined = reduction.restore(refined)
        return merges[0][0].unflatten(refined)

    return Reduction(merges[-1][1].tokens, positions=None, sizes=None, restore=restore)


def draw_tokens(image: np.ndarray, tokens: Tokens) -> np.ndarray:
    """
    Args:
        image: (H, W, 3) uint8 RGB, at any scale.
        tokens: of it.

    Returns:
        (h, w, 3) uint8 RGB: clusters have thin borders, windows orange ones, and tokens that do not run are dark.
    """
    longest = max(image.shape[:2])
    cells = max(side / cell for side, cell in zip(tokens.size, tokens.cell))
    scale = float(np.clip(CELL * cells, *SIDES)) / longest
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = cv2.resize(image, (width, height), interpolation=interpolation).astype(float)
    # The token of each row and each column of pixels.
    axes = [
        ((np.arange(pixels) + 0.5) * side / pixels / cell).astype(int)
        for pixels, side, cell in zip((height, width), tokens.size, tokens.cell)
    ]
    if tokens.selected is not None:
        rows, columns = (axis.clip(max=side - 1) for axis, side in zip(axes, tokens.selected.shape))
        picture[~tokens.selected[np.ix_(rows, columns)]] *= 0.3
    if tokens.labels is not None:
        rows, columns = (axis.clip(max=side - 1) for axis, side in zip(axes, tokens.labels.shape))
        border = borders(tokens.labels[np.ix_(rows, columns)])
        ink = np.where(picture[border].mean(axis=1, keepdims=True) > 140, 0, 255)  # black on what is bright
        picture[border] = 0.45 * picture[border] + 0.55 * ink
    if tokens.window:
        window = borders(np.add.outer(axes[0] // tokens.window * (1 << 20), axes[1] // tokens.window))
        picture[cv2.dilate(window.astype(np.uint8), np.ones((2, 2), np.uint8)) > 0] = ORANGE
    return picture.round().astype(np.uint8)
