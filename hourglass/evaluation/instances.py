"""The accuracy of boxes and masks, and how sure it is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import COCOEvaluator

from hourglass.errors import InputError


class Matches(NamedTuple):
    """
    What COCO's evaluation found of one category, over all images. Letters: I images, D detections by falling score, T
    thresholds of IoU.

    Attributes:
        objects: (I,) number of objects to be found.
        image: (D,) the image of each detection, counted from 0.
        found: (T, D) whether it found an object.
        counts: (T, D) whether it counts: those that found an ignored object do not.
    """

    objects: np.ndarray
    image: np.ndarray
    found: np.ndarray
    counts: np.ndarray


class InstanceEvaluator(COCOEvaluator):
    """
    Detectron2's ``COCOEvaluator``, which keeps what AP is made of, so that images can be drawn again.

    Args:
        args, options: as for ``COCOEvaluator``.
        sides: also keep what AP is made of for objects of some sizes alone: between these sides in pixels, the square
            roots of areas. COCO's small, medium and large are (32, 96).
    """

    def __init__(self, *args: Any, sides: Sequence[float] = (), **options: Any):
        if list(sides) != sorted(set(sides)) or any(side <= 0 for side in sides):
            raise InputError(f"sides takes growing numbers of pixels over 0, got {list(sides)}")
        super().__init__(*args, **options)
        limits = [0, *sides, 1e5]
        self._areas = {} if not sides else {size: (size[0] ** 2, size[1] ** 2) for size in zip(limits, limits[1:])}

    @property
    def max_detections(self) -> int:
        """How many detections of an image are evaluated, those with the highest scores."""
        return self._max_dets_per_image[-1]

    def reset(self) -> None:
        super().reset()
        #: Task ("bbox" or "segm") -> of each category that has objects.
        self.matches: dict[str, list[Matches]] = {}
        #: Smallest and largest side in pixels -> as `matches`, of objects of this size.
        self.matches_of_size: dict[tuple[float, float], dict[str, list[Matches]]] = {size: {} for size in self._areas}
        #: The images, in the order of the matches.
        self.image_ids: list[Any] = []

    def dump(self, image_id: Any) -> Any:
        """What :meth:`process` kept of the image that came last, as JSON has it."""
        return self._predictions[-1] if self._predictions and self._predictions[-1]["image_id"] == image_id else None

    def restore(self, image_id: Any, record: Any) -> None:
        """Keep what :meth:`dump` returned of an image."""
        if record is not None:
            self._predictions.append(record)

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None) -> dict:
        if coco_eval is not None:
            self.image_ids = list(coco_eval.params.imgIds)
            self.matches[iou_type] = read_matches(coco_eval)
            for size, area in self._areas.items():
                self.matches_of_size[size][iou_type] = read_matches(coco_eval, area)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def resample(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            weights: (samples, I), how often each of `image_ids` is in a sample.

        Returns:
            "bbox.AP" and "segm.AP", those that were evaluated -> (samples,) in percent.
        """
        return {f"{task}.AP": average_precision(matches, weights) for task, matches in self.matches.items()}


def read_matches(coco_eval: Any, area: tuple[float, float] | None = None) -> list[Matches]:
    """
    The matches of a pycocotools ``COCOeval`` that has been evaluated, of each category with objects.

    Args:
        coco_eval: after ``evaluate()``.
        area: smallest and largest area of the objects in pixels; None: all. As COCO has it, others are ignored, with
            what finds them, and detections of other areas that find nothing.
    """
    params = coco_eval.params
    most = params.maxDets[-1]
    images = len(params.imgIds)
    # Of each category, each range of areas and each image, in this order; the first range is of all.
    known = np.empty(len(coco_eval.evalImgs), dtype=object)
    known[:] = coco_eval.evalImgs
    known = known.reshape(-1, len(params.areaRng), images)[:, 0]
    categories = []
    for category, results in zip(params.catIds, known):
        if area is not None:
            results = [coco_eval.evaluateImg(image, category, area, most) for image in params.imgIds]
        objects = np.array([0 if one is None else int(np.sum(one["gtIgnore"] == 0)) for one in results])
        if not objects.any():
            continue
        each = [(i, one) for i, one in enumerate(results) if one is not None]
        score = np.concatenate([one["dtScores"][:most] for _, one in each])
        order = np.argsort(-score, kind="mergesort")  # as COCO's, for equal scores
        matched = np.concatenate([one["dtMatches"][:, :most] for _, one in each], axis=1)[:, order] > 0
        ignored = np.concatenate([one["dtIgnore"][:, :most] for _, one in each], axis=1)[:, order] > 0
        image = np.concatenate([np.full(len(one["dtScores"][:most]), i) for i, one in each])[order]
        categories.append(Matches(objects, image, matched & ~ignored, ~ignored))
    return categories


RECALLS = np.linspace(0.0, 1.0, 101)


def average_precision(categories: list[Matches], weights: np.ndarray) -> np.ndarray:
    """
    COCO's AP (over the thresholds of IoU and 101 recalls) of samples of the images.

    Args:
        categories: of one task.
        weights: (samples, I), how often each image is in a sample.

    Returns:
        (samples,) in percent; nan for a sample without objects.
    """
    total, present = np.zeros(len(weights)), np.zeros(len(weights))
    for category in categories:
        objects = weights @ category.objects
        times = weights[:, category.image]
        mean = np.zeros(len(weights))
        counts, detections = None, None
        for found, its_counts in zip(category.found, category.counts):
            if counts is None or (its_counts != counts).any():  # the same at most thresholds
                counts, detections = its_counts, np.cumsum(times * its_counts, axis=1)
            # Precision falls between two that find something, so that only these are looked at.
            true = np.cumsum(times[:, found], axis=1)
            recall = true / np.maximum(objects, 1)[:, None]
            precision = true / np.maximum(detections[:, found], 1)
            # The best precision at this recall or a higher one; 0 where it is not reached.
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            precision = np.pad(precision, ((0, 0), (0, 1)))
            for sample in range(len(weights)):
                mean[sample] += precision[sample, np.searchsorted(recall[sample], RECALLS)].mean()
        total += np.where(objects > 0, mean / len(category.found), 0)
        present += objects > 0
    return 100 * np.divide(total, present, out=np.full(len(weights), np.nan), where=present > 0)
