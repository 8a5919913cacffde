"""
From the queries of Mask2Former (arXiv 2112.01527) to segmentations of one image.

Q queries, K classes and "no object" after them. Mask logits are (Q, h, w); ``resize`` brings some of them to the size
of the output and is only called for the queries that are needed, a few at a time: the masks of all queries at full
resolution would be most of the memory that inference takes.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

Resize = Callable[[Tensor], Tensor]

# Masks at full resolution at a time.
_CHUNK = 16


def resize_masks(masks: Tensor, padded: tuple[int, int], image: tuple[int, int], output: tuple[int, int]) -> Tensor:
    """
    Bring masks to the size of the output as the published models do: up to the size of the padded batch, without the
    padding, then to the output.

    Args:
        masks: (N, h, w) float logits or probabilities over the padded image.
        padded: (height, width) of the padded batch.
        image: of the image in it.
        output: of the result.

    Returns:
        (N, *output)
    """
    return crop_and_resize(_interpolate(masks, padded), image, output)


def crop_and_resize(masks: Tensor, image: tuple[int, int], output: tuple[int, int]) -> Tensor:
    """(N, H, W) over the padded image -> (N, *output) over the image."""
    return _interpolate(masks[:, : image[0], : image[1]], output)


def _interpolate(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(masks.shape[-2:]) == tuple(size):  # bilinear to the same size is the identity
        return masks
    return F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]


def _identity(masks: Tensor) -> Tensor:
    return masks


def _resized(masks: Tensor, resize: Resize) -> Iterator[tuple[slice, Tensor]]:
    """Which of the masks, and those at full resolution."""
    for first in range(0, len(masks), _CHUNK):
        part = slice(first, first + _CHUNK)
        yield part, resize(masks[part])


def semantic_inference(classes: Tensor, masks: Tensor, resize: Resize = _identity) -> Tensor:
    """
    The evidence for each class at each pixel: over the queries, the sum of class times mask probability.

    Args:
        classes: (Q, K + 1) logits.
        masks: (Q, h, w) logits.
        resize: (N, h, w) -> (N, H, W).

    Returns:
        (K, H, W), not normalised over the classes.
    """
    scores = classes.softmax(-1)[:, :-1]
    total = None
    for part, full in _resized(masks, resize):
        evidence = torch.einsum("qk,qhw->khw", scores[part], full.sigmoid())
        total = evidence if total is None else total.add_(evidence)
    return total


def panoptic_inference(
    classes: Tensor,
    masks: Tensor,
    things: Collection[int],
    object_mask_threshold: float,
    overlap_threshold: float,
    resize: Resize = _identity,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """
    Give each pixel to the query with the highest score there.

    Args:
        classes: (Q, K + 1) logits.
        masks: (Q, h, w) logits.
        things: the classes whose instances are told apart; segments of any other class are joined.
        object_mask_threshold: queries whose best class has no higher probability are left out.
        overlap_threshold: a segment is left out where its query wins less than this share of its own mask.
        resize: (N, h, w) -> (N, H, W).

    Returns:
        (H, W) int32 segment ids, 0 where there is none, and {"id", "isthing", "category_id"} of each segment.
    """
    scores, labels = classes.softmax(-1).max(-1)
    keep = (labels != classes.shape[-1] - 1) & (scores > object_mask_threshold)
    if not keep.any():
        height, width = resize(masks[:1]).shape[-2:]
        return masks.new_zeros((height, width), dtype=torch.int32), []

    scores, labels = scores[keep], labels[keep]
    best = winner = None
    insides = []
    for part, full in _resized(masks[keep], resize):
        probabilities = full.sigmoid()
        insides.extend(probabilities >= 0.5)
        score, index = (scores[part, None, None] * probabilities).max(0)
        index += part.start
        if best is None:
            best, winner = score, index
        else:
            winner = torch.where(score > best, index, winner)
            best = torch.maximum(score, best)

    segments = torch.zeros_like(winner, dtype=torch.int32)
    segments_info, id_of_stuff = [], {}
    # All areas at once: to read one waits for the device.
    numbers = range(len(insides))
    areas = [[(winner == i).sum(), inside.sum(), ((winner == i) & inside).sum()] for i, inside in zip(numbers, insides)]
    areas = torch.stack([torch.stack(of_segment) for of_segment in areas]).tolist()
    for index, (category, inside, (won, total, area)) in enumerate(zip(labels.tolist(), insides, areas)):
        if area == 0 or won / total < overlap_threshold:
            continue
        segment = (winner == index) & inside
        if category in id_of_stuff:
            segments[segment] = id_of_stuff[category]
            continue
        number = len(segments_info) + 1
        segments[segment] = number
        segments_info.append({"id": number, "isthing": category in things, "category_id": category})
        if category not in things:
            id_of_stuff[category] = number
    return segments, segments_info


def instance_inference(
    classes: Tensor,
    masks: Tensor,
    most: int,
    things: Collection[int] | None = None,
    resize: Resize = _identity,
) -> Instances:
    """
    The best pairs of a query and a class. One query can be several instances, of different classes.

    Args:
        classes: (Q, K + 1) logits.
        masks: (Q, h, w) logits.
        most: instances at most (fewer where there are fewer pairs).
        things: of those instances, only the ones of these classes; None: all.
        resize: (N, h, w) -> (N, H, W).

    Returns:
        of size (H, W): ``pred_masks`` (N, H, W) bool, ``pred_boxes`` tight around them, ``scores``, ``pred_classes``.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    scores, pairs = probabilities.flatten().topk(min(most, probabilities.numel()))
    queries, labels = pairs // num_classes, pairs % num_classes
    if things is not None:
        keep = torch.isin(labels, torch.tensor(sorted(things), dtype=labels.dtype, device=labels.device))
        queries, labels, scores = queries[keep], labels[keep], scores[keep]

    needed, position = queries.unique(return_inverse=True)
    if len(needed) == 0:
        height, width = resize(masks[:1]).shape[-2:]
        pred_masks, quality = masks.new_zeros((0, height, width), dtype=torch.bool), scores
    else:
        pred_masks, quality = [], []
        for _, full in _resized(masks[needed], resize):
            inside = full > 0
            pred_masks.append(inside)
            quality.append((full.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
        pred_masks, quality = torch.cat(pred_masks)[position], torch.cat(quality)[position]

    result = Instances(tuple(pred_masks.shape[-2:]))
    result.pred_masks = pred_masks
    result.pred_boxes = Boxes(tight_boxes(pred_masks))
    result.scores = scores * quality
    result.pred_classes = labels
    return result


def tight_boxes(masks: Tensor) -> Tensor:
    """
    The boxes around masks (N, H, W) bool, for all at once: Detectron2's own loop waits for the device at each.

    Returns:
        (N, 4) float32 (x0, y0, x1, y1), 0 for an empty mask.
    """
    sides = []
    for occupied in (masks.any(1), masks.any(2)):  # columns, rows
        occupied = occupied.to(torch.uint8)
        first, last = occupied.argmax(1), occupied.shape[1] - occupied.flip(1).argmax(1)
        sides.append(torch.stack([first, last], dim=1) * occupied.amax(1, keepdim=True))
    return torch.stack(sides, dim=2).flatten(1).float()
