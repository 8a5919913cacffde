"""The accuracy of boxes and masks, and how sure it is."""

from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import COCOEvaluator

from hourglass.evaluation.timing import Interval


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
    """Detectron2's ``COCOEvaluator``, which keeps what AP is made of, so that images can be drawn again."""

    def reset(self) -> None:
        super().reset()
        #: Task ("bbox" or "segm") -> of each category that has objects.
        self.matches: dict[str, list[Matches]] = {}

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None) -> dict:
        if coco_eval is not None:
            self.matches[iou_type] = read_matches(coco_eval)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


def read_matches(coco_eval: Any) -> list[Matches]:
    """The matches of a pycocotools ``COCOeval`` that has been evaluated, of each category with objects, of any size."""
    params = coco_eval.params
    images = len(params.imgIds)
    # Of each category, each range of areas and each image, in this order; the first range is of all.
    per_image = np.empty(len(coco_eval.evalImgs), dtype=object)
    per_image[:] = coco_eval.evalImgs
    per_image = per_image.reshape(-1, len(params.areaRng), images)[:, 0]
    categories = []
    for results in per_image:
        objects = np.array([0 if one is None else int(np.sum(one["gtIgnore"] == 0)) for one in results])
        if not objects.any():
            continue
        each = [(i, one) for i, one in enumerate(results) if one is not None]
        most = params.maxDets[-1]
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
        for found, counts in zip(category.found, category.counts):
            true = np.cumsum(times * found, axis=1)
            recall = true / np.maximum(objects, 1)[:, None]
            precision = true / np.maximum(np.cumsum(times * counts, axis=1), 1)
            # The best precision at this recall or a higher one; 0 where it is not reached.
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            precision = np.pad(precision, ((0, 0), (0, 1)))
            for sample in range(len(weights)):
                mean[sample] += precision[sample, np.searchsorted(recall[sample], RECALLS)].mean()
        total += np.where(objects > 0, mean / len(category.found), 0)
        present += objects > 0
    return 100 * np.divide(total, present, out=np.full(len(weights), np.nan), where=present > 0)


def retention_of_ap(first: list[Matches], kept: list[Matches], resamples: int = 500, seed: int = 0) -> Interval:
    """
    The share of a model's AP that another keeps, with a paired 95 % bootstrap interval over images.

    Args:
        first, kept: the two models' matches in one task, on the same images.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    images = len(first[0].objects)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    weights = np.concatenate([np.ones((1, images), dtype=int), draws])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = average_precision(kept, weights) / average_precision(first, weights)
    low, high = np.nanpercentile(shares[1:], [2.5, 97.5])
    return Interval(float(shares[0]), float(low), float(high))
