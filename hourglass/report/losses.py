"""
The changes that a plan makes, detection by detection: the expedited model's output matched with the unmodified one's.

Letters: N detections (or segments) of the unmodified model in an image, M of the expedited one, T objects.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from hourglass.data.panoptic import read_panoptic_ids
from hourglass.errors import InputError
from hourglass.evaluation.agreement import OutputRecorder
from hourglass.report import FAINT

#: The kinds of changes. A detection of the unmodified model is of one of the first four, a detection of the expedited
#: model of one of the first three or the last two.
KINDS = ("kept", "moved", "class changed", "lost", "duplicate", "new")
KEPT, MOVED, CLASS, LOST, DUPLICATE, NEW = range(len(KINDS))
OF_FIRST = (KEPT, MOVED, CLASS, LOST)
OF_SECOND = (KEPT, MOVED, CLASS, DUPLICATE, NEW)

#: Detections with at least this score are compared.
SCORE = 0.5
# From which IoU on a detection is the same; moved; the same with another class, or right.
SAME, NEAR, HALF = 0.75, 0.25, 0.5
#: Verdicts on a detection by the ground truth; ignored are those in a crowd or where there is no ground truth.
WRONG, RIGHT, IGNORED = 0, 1, -1


class Segments(NamedTuple):
    """
    A map of segments that do not overlap, as runs of pixels of one segment, row by row.

    Attributes:
        starts: (R,) where each run starts; the first at 0.
        segments: (R,) int64, the number of its segment, counted from 1; 0: none.
        size: (height, width) of the map.
        number: how many segments there are.
    """

    starts: np.ndarray
    segments: np.ndarray
    size: tuple[int, int]
    number: int

    def mask(self, number: int) -> np.ndarray:
        """(H, W) uint8 of a segment, counted from 0."""
        ends = np.append(self.starts[1:], int(np.prod(self.size)))
        return np.repeat((self.segments == number + 1).astype(np.uint8), ends - self.starts).reshape(self.size)


class Detections(NamedTuple):
    """
    A model's detections in an image, or the objects of its ground truth.

    Attributes:
        classes: (N,) int.
        scores: (N,); 1 for segments and objects.
        shapes: N masks as COCO's RLE, (N, 4) boxes (left, top, width, height), or segments.
        size: (height, width) of the image in pixels.
    """

    classes: np.ndarray
    scores: np.ndarray
    shapes: list[dict[str, Any]] | np.ndarray | Segments
    size: tuple[int, int]

    def above_score(self, score: float) -> "Detections":
        """The detections of at least this score; segments have no scores, and all are kept."""
        if isinstance(self.shapes, Segments):
            return self
        chosen = np.flatnonzero(self.scores >= score)
        shapes = self.shapes[chosen] if isinstance(self.shapes, np.ndarray) else [self.shapes[i] for i in chosen]
        return Detections(self.classes[chosen], self.scores[chosen], shapes, self.size)


class Truth(NamedTuple):
    """
    Attributes:
        objects: T of them.
        crowd: (T,) whether each is a crowd.
    """

    objects: Detections
    crowd: np.ndarray


class Overlap(NamedTuple):
    """
    The overlap of N shapes with M others.

    Attributes:
        iou: (N, M) intersection over union.
        share: (N, M) the share of each of the M that lies on each of the N.
    """

    iou: np.ndarray
    share: np.ndarray


def overlap(first: Detections, second: Detections) -> Overlap:
    """The overlap of two models' detections in one image; both have the same type of shapes."""
    if isinstance(first.shapes, Segments):
        assert isinstance(second.shapes, Segments)
        joint = _joint(first.shapes, second.shapes)
        area, other_area = joint.sum(1)[1:, None], joint.sum(0)[None, 1:]
        common = joint[1:, 1:]
        return Overlap(common / np.maximum(area + other_area - common, 1), common / np.maximum(other_area, 1))
    if not len(first.classes) or not len(second.classes):
        nothing = np.zeros((len(first.classes), len(second.classes)))
        return Overlap(nothing, nothing)
    iou = rle.iou(first.shapes, second.shapes, [0] * len(second.classes))
    share = rle.iou(second.shapes, first.shapes, [1] * len(first.classes)).T
    return Overlap(np.asarray(iou), np.nan_to_num(share))


def _joint(first: Segments, second: Segments) -> np.ndarray:
    """(1 + N, 1 + M) pixels that segments have in common; row and column 0 are of no segment."""
    if first.size != second.size:
        sizes = " and ".join(" x ".join(map(str, segments.size)) for segments in (first, second))
        raise InputError(f"maps of segments of one image must have one size, got {sizes}")
    either = np.zeros(int(np.prod(first.size)), bool)
    either[first.starts] = either[second.starts] = True
    starts = np.flatnonzero(either)
    rows, columns = (
        segments.segments[np.searchsorted(segments.starts, starts, "right") - 1] for segments in (first, second)
    )
    width, shape = second.number + 1, (first.number + 1, second.number + 1)
    lengths = np.diff(starts, append=len(either))
    return np.bincount(rows * width + columns, lengths, minlength=int(np.prod(shape))).reshape(shape)


class Changes(NamedTuple):
    """
    The changes between two models' detections in an image.

    Attributes:
        first: (N,) kind of each detection of the unmodified model, from :data:`OF_FIRST`.
        second: (M,) kind of each detection of the expedited model, from :data:`OF_SECOND`.
        partner: (N,) index of the expedited model's detection that it is matched with; -1: lost.
    """

    first: np.ndarray
    second: np.ndarray
    partner: np.ndarray


def match(first: Detections, second: Detections, overlaps: Overlap) -> Changes:
    """
    Match each detection of the unmodified model with at most one of the expedited model's.

    A pair of one class with an IoU of at least 0.75 is kept. Then, in the order of falling IoU, a pair of one class
    with an IoU of at least 0.25 is moved, and a pair of two classes with at least 0.5 has its class changed. An
    unmatched detection of the unmodified model is lost. An unmatched one of the expedited model is a duplicate if it
    has an IoU of at least 0.5 with a matched one, or the class of a matched one on which more than half of it lies;
    else it is new.

    Args:
        first, second: of one image.
        overlaps: of the two.
    """
    same_class = first.classes[:, None] == second.classes
    kinds, second_kinds = np.full(len(first.classes), LOST), np.full(len(second.classes), NEW)
    partner = np.full(len(first.classes), -1)
    iou = overlaps.iou
    near = np.where(same_class, iou >= NEAR, iou >= HALF)
    for candidates in (same_class & (iou >= SAME), near):
        pairs = np.argwhere(candidates)
        for i, j in pairs[np.argsort(-iou[candidates], kind="stable")]:
            if kinds[i] != LOST or second_kinds[j] != NEW:
                continue
            kind = CLASS if not same_class[i, j] else KEPT if iou[i, j] >= SAME else MOVED
            kinds[i] = second_kinds[j] = kind
            partner[i] = j
    again = (iou >= HALF) | same_class & (overlaps.share > HALF)
    second_kinds[(second_kinds == NEW) & again[kinds != LOST].any(axis=0)] = DUPLICATE
    return Changes(kinds, second_kinds, partner)


def check(detections: Detections, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """
    Judge detections by the ground truth: as COCO does at an IoU of 0.5, in the order of falling scores, and segments as
    panoptic quality does.

    Returns:
        (N,) of :data:`WRONG`, :data:`RIGHT` and :data:`IGNORED`; (T,) whether each object is found.
    """
    objects = truth.objects
    same_class = detections.classes[:, None] == objects.classes
    if isinstance(detections.shapes, Segments):
        assert isinstance(objects.shapes, Segments)
        joint = _joint(detections.shapes, objects.shapes)
        area, common = joint.sum(1)[1:], joint[1:, 1:]
        union = area[:, None] - joint[1:, :1] + joint.sum(0)[1:] - common
        pairs = same_class & ~truth.crowd & (common / np.maximum(union, 1) > HALF)
        in_crowd = (common * (same_class & truth.crowd)).sum(1)
        ignored = (joint[1:, 0] + in_crowd) / np.maximum(area, 1) > HALF
        verdict = np.where(pairs.any(axis=1), RIGHT, np.where(ignored, IGNORED, WRONG))
        return verdict, pairs.any(axis=0)
    verdict, taken = np.full(len(detections.classes), WRONG), np.zeros(len(objects.classes), bool)
    if not len(verdict) or not len(taken):
        return verdict, taken
    iou = np.asarray(rle.iou(detections.shapes, objects.shapes, truth.crowd.astype(int).tolist()))
    possible = np.where(same_class & (iou >= HALF), iou, 0)
    for i in np.argsort(-detections.scores, kind="stable"):
        free = np.where(taken | truth.crowd, 0, possible[i])
        if free.any():
            taken[free.argmax()] = True
            verdict[i] = RIGHT
        elif possible[i][truth.crowd].any():
            verdict[i] = IGNORED
    return verdict, taken


class Examined(NamedTuple):
    """
    Both models' output on one image, matched.

    Attributes:
        first, second: detections of the unmodified and of the expedited model, of at least the score.
        changes: between them.
        right: verdicts on both models' detections, see :func:`check`; None without labels.
        truth: the ground truth; None without labels.
        found: (T,) for each model, whether it found each object; None without labels.
        faint: how many lost detections the expedited model has with a lower score, at least a fifth of the limit, and
            how many new ones the unmodified model has.
    """

    first: Detections
    second: Detections
    changes: Changes
    right: tuple[np.ndarray, np.ndarray] | None
    truth: Truth | None
    found: tuple[np.ndarray, np.ndarray] | None
    faint: tuple[int, int]

    @property
    def changed(self) -> int:
        """Number of changes: detections that are not kept, a pair counted once."""
        return int((self.changes.first != KEPT).sum() + np.isin(self.changes.second, (DUPLICATE, NEW)).sum())


class _Reading(NamedTuple):
    """How an image's output and its ground truth are read; both get whether masks (else boxes) are compared."""

    found: Callable[[dict[str, Any], bool], Detections]
    truth: Callable[[dict[str, Any], tuple[int, int], bool], Truth | None]


class Task:
    """
    One type of output of both models, on the same images.

    Args:
        name: "instances", "panoptic segments" or "classes of pixels".
        first, second: what the unmodified and the expedited model gave.
        records: image id -> the data set's record.
        metadata: of the data set.
        score: detections of at least this score are looked at.
    """

    def __init__(
        self,
        name: str,
        first: OutputRecorder,
        second: OutputRecorder,
        records: dict[Any, dict[str, Any]],
        metadata: Metadata,
        score: float = SCORE,
    ):
        self.name, self.first, self.second = name, first, second
        self.records, self.metadata, self.score = records, metadata, score
        ignored = partial(_true_semantic, ignored=metadata.get("ignore_label", 255))
        self._read, self._read_truth = {
            "instances": _Reading(_instances, _true_instances),
            "panoptic segments": _Reading(_panoptic, _true_panoptic),
            "classes of pixels": _Reading(_semantic, ignored),
        }[name]

    def class_name(self, number: int) -> str:
        """What a class is called."""
        if self.name == "instances":
            return _class_name(self.metadata.get("thing_classes"), number)
        # Twice the id, and 1 more for a thing.
        names = self.metadata.get("thing_classes" if number % 2 else "stuff_classes")
        return _class_name(names, number // 2)

    def examine(self, image_id: Any) -> Examined:
        """
        Match both models' output on an image, and read its labels where there are some.

        Raises:
            InputError: for labels that cannot be read, or are of another size.
        """
        kept = [recorder.outputs[image_id] for recorder in (self.first, self.second)]
        masks = all("segm" in output for output in kept)
        record = self.records[image_id]
        if self.name == "instances":
            annotations = record.get("annotations", [])
            # Boxes are compared where there is no mask of some object; Mask2Former's are empty.
            boxes = all(
                "bbox" in output and (output["bbox"][:, 2:].any() or not len(output["bbox"])) for output in kept
            )
            masks = masks and not (boxes and not all(annotation.get("segmentation") for annotation in annotations))
        all_first, all_second = (self._read(output, masks) for output in kept)
        first, second = all_first.above_score(self.score), all_second.above_score(self.score)
        changes = match(first, second, overlap(first, second))
        truth = self._read_truth(record, first.size, masks)
        right = found = None
        if truth is not None:
            verdicts = [check(detections, truth) for detections in (first, second)]
            right = verdicts[0][0], verdicts[1][0]
            found = verdicts[0][1], verdicts[1][1]
        faint = (
            _count_faint(first, changes.first == LOST, all_second, self.score),
            _count_faint(second, changes.second == NEW, all_first, self.score),
        )
        return Examined(first, second, changes, right, truth, found, faint)


def find_tasks(
    first: OutputRecorder,
    second: OutputRecorder,
    records: Sequence[dict[str, Any]],
    metadata: Metadata,
    score: float = SCORE,
) -> list[Task]:
    """What both models gave of every image; classes of pixels where there are no segments."""
    by_id = {record["image_id"]: record for record in records}
    pairs = [(first.outputs[image_id], second.outputs[image_id]) for image_id in by_id]

    def has(*keys: str) -> bool:
        return all(any(key in kept for key in keys) for pair in pairs for kept in pair)

    names = []
    if has("bbox") or has("segm"):
        names.append("instances")
    if has("panoptic_seg"):
        names.append("panoptic segments")
    elif has("sem_seg"):
        names.append("classes of pixels")
    return [Task(name, first, second, by_id, metadata, score) for name in names]


class Losses(NamedTuple):
    """
    The changes that a plan makes, over all images.

    Attributes:
        counts: class -> (kinds, 3): how many of each of :data:`KINDS`, and how many of these are right in the
            unmodified and in the expedited model's output. A pair is counted once, under the unmodified model's class.
        first, second: how many detections there are.
        faint: see :class:`Examined`.
        objects: how many there are, and how many the unmodified and the expedited model find; None without labels.
        changed: image id -> how many detections are not kept.
    """

    counts: dict[int, np.ndarray]
    first: int
    second: int
    faint: tuple[int, int]
    objects: tuple[int, int, int] | None
    changed: dict[Any, int]

    @property
    def total(self) -> np.ndarray:
        """(kinds, 3) over all classes."""
        return sum(self.counts.values(), np.zeros((len(KINDS), 3), int))

    def worst(self, count: int) -> list[Any]:
        """The ids of the ``count`` images with most changes, without those that have none."""
        order = sorted(self.changed, key=lambda image_id: -self.changed[image_id])
        return [image_id for image_id in order[:count] if self.changed[image_id]]


def find_losses(task: Task) -> Losses:
    """
    Count the changes, image by image. Pixels of images are not read, and only counts are kept.

    Args:
        task: whose images are counted.
    """
    counts: dict[int, np.ndarray] = defaultdict(lambda: np.zeros((len(KINDS), 3), int))
    numbers, changed = np.zeros(7, int), {}
    labelled = False
    ids = list(task.records)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # files are waited for, and decoded
        results = pool.map(lambda image_id: _count(task.examine(image_id)), ids)
        for image_id, result in zip(ids, tqdm(results, desc=f"matching {task.name}", unit="image", total=len(ids))):
            for number, class_counts in result.counts.items():
                counts[number] += class_counts
            numbers += result.numbers
            changed[image_id] = result.changed
            labelled |= result.labelled
    first, second, lost_faint, new_faint, *objects = numbers.tolist()
    total, found_by_first, found_by_second = objects
    return Losses(
        dict(counts),
        first,
        second,
        (lost_faint, new_faint),
        (total, found_by_first, found_by_second) if labelled else None,
        changed,
    )


class _Counted(NamedTuple):
    counts: dict[int, np.ndarray]
    numbers: np.ndarray
    changed: int
    labelled: bool


def _count(image: Examined) -> _Counted:
    changes = image.changes
    nothing = np.zeros(len(image.first.classes), int), np.zeros(len(image.second.classes), int)
    right_first, right_second = ((verdict == RIGHT).astype(int) for verdict in image.right or nothing)
    alone = np.flatnonzero(np.isin(changes.second, (DUPLICATE, NEW)))
    paired = changes.partner >= 0
    right_after = np.zeros(len(right_first), int)
    right_after[paired] = right_second[changes.partner[paired]]
    rows = np.concatenate(
        [
            np.stack([image.first.classes, changes.first, right_first, right_after], axis=1),
            np.stack([image.second.classes, changes.second, np.zeros_like(right_second), right_second], axis=1)[alone],
        ]
    ).astype(int)
    classes, place = np.unique(rows[:, 0], return_inverse=True)
    cells, shape = place * len(KINDS) + rows[:, 1], (len(classes), len(KINDS))
    parts = [np.bincount(cells, weights, int(np.prod(shape))) for weights in (None, rows[:, 2], rows[:, 3])]
    counts = dict(zip(classes.tolist(), np.stack(parts, axis=1).astype(int).reshape(*shape, 3)))
    objects = [0, 0, 0]
    if image.truth is not None and image.found is not None:
        objects = [int((~image.truth.crowd).sum()), *(int((found & ~image.truth.crowd).sum()) for found in image.found)]
    numbers = [len(image.first.classes), len(image.second.classes), *image.faint, *objects]
    return _Counted(counts, np.array(numbers), image.changed, image.truth is not None)


def _count_faint(detections: Detections, chosen: np.ndarray, candidates: Detections, score: float) -> int:
    """How many of the chosen detections the other model has with a score that is too low."""
    if isinstance(detections.shapes, Segments) or not chosen.any():
        return 0
    number = np.flatnonzero(chosen)
    shapes = (
        detections.shapes[number]
        if isinstance(detections.shapes, np.ndarray)
        else [detections.shapes[i] for i in number]
    )
    lacking = Detections(detections.classes[number], detections.scores[number], shapes, detections.size)
    same_class = (lacking.classes[:, None] == candidates.classes) & _is_faint(candidates.scores, score)
    return int((same_class & (overlap(lacking, candidates).iou >= HALF)).any(axis=1).sum())


def _is_faint(scores: np.ndarray, score: float) -> np.ndarray:
    return (scores < score) & (scores >= FAINT * score)


def _class_name(names: Sequence[str] | None, number: int) -> str:
    return names[number] if names is not None and 0 <= number < len(names) else f"class {number}"


# --- what the models gave -------------------------------------------------------------------------------------------


def _instances(kept: dict[str, Any], masks: bool) -> Detections:
    return Detections(kept["classes"], kept["scores"], kept["segm"] if masks else kept["bbox"], kept["size"])


def _panoptic(kept: dict[str, Any], masks: bool) -> Detections:
    ids, info = kept["panoptic_seg"]
    return _segments(ids.read(), [segment["id"] for segment in info], [segment["category_id"] for segment in info])


def _semantic(kept: dict[str, Any], masks: bool) -> Detections:
    classes, count = kept["sem_seg"]
    return _of_classes(classes.read(), count)


def _segments(ids: np.ndarray, segment_numbers: Sequence[int], classes: Sequence[int]) -> Detections:
    """Of a map of ids, of which those that are not known are of no segment."""
    order = np.argsort(np.array(segment_numbers, int))
    ordered = np.array(segment_numbers, int)[order]
    flat = np.ascontiguousarray(ids).ravel()
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    values = flat[starts]
    numbers = np.zeros(len(starts), np.int64)
    if len(ordered):
        place = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
        numbers = np.where(ordered[place] == values, order[place] + 1, 0)
    segments = Segments(starts, numbers, ids.shape, len(segment_numbers))
    return Detections(np.array(classes, int), np.ones(len(segment_numbers)), segments, ids.shape)


def _of_classes(pixels: np.ndarray, count: int) -> Detections:
    """A segment for each class that is there, as of stuff; others are of none."""
    present = np.flatnonzero(np.bincount(pixels[pixels < count].ravel(), minlength=1))
    return _segments(pixels, present.tolist(), (2 * present).tolist())


# --- the truth ------------------------------------------------------------------------------------------------------


def _true_instances(record: dict[str, Any], size: tuple[int, int], masks: bool) -> Truth | None:
    if "annotations" not in record:
        return None
    annotations = record["annotations"]
    if masks and not all(annotation.get("segmentation") for annotation in annotations):
        return None
    shapes: Any
    if masks:
        shapes = [_run_lengths(annotation["segmentation"], size) for annotation in annotations]
    else:
        boxes = [
            BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS)
            for annotation in annotations
        ]
        shapes = np.array(boxes, float).reshape(-1, 4)
    classes = np.array([annotation["category_id"] for annotation in annotations], int)
    crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], bool)
    return Truth(Detections(classes, np.ones(len(classes)), shapes, size), crowd)


def _run_lengths(mask: Any, size: tuple[int, int]) -> dict[str, Any]:
    """An annotation's polygons or RLE as compressed RLE."""
    if isinstance(mask, dict):
        return rle.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask
    return rle.merge(rle.frPyObjects(mask, *size))


def _true_panoptic(record: dict[str, Any], size: tuple[int, int], masks: bool) -> Truth | None:
    if "pan_seg_file_name" not in record or "segments_info" not in record:
        return None
    info = record["segments_info"]
    classes = [2 * segment["category_id"] + int(bool(segment.get("isthing", True))) for segment in info]
    ids = read_panoptic_ids(record["pan_seg_file_name"])
    crowd = np.array([bool(segment.get("iscrowd", 0)) for segment in info], bool)
    return Truth(_segments(ids, [segment["id"] for segment in info], classes), crowd)


def _true_semantic(record: dict[str, Any], size: tuple[int, int], masks: bool, ignored: int) -> Truth | None:
    if "sem_seg_file_name" not in record:
        return None
    with Image.open(record["sem_seg_file_name"]) as image:
        classes = np.array(image).astype(np.int64)
    classes = np.where(classes == ignored, 1 << 16, classes)
    segments = _of_classes(classes, 1 << 16)
    return Truth(segments, np.zeros(len(segments.classes), bool))
