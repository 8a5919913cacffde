"""The accuracy of boxes and masks, and how sure it is."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, RotatedCOCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hourglass.checks import check_count
from hourglass.errors import InputError
from hourglass.evaluation.resampling import mean_of_classes, name_classes

# What detections have where a task beside boxes is evaluated.
FIELDS = {"segm": "pred_masks", "keypoints": "pred_keypoints"}


class Matches(NamedTuple):
    """
    What COCO's evaluation found of one category, over all images. Letters: I images, D detections by falling score, T
    thresholds of IoU.

    Attributes:
        category: its id in the data set.
        objects: (I,) number of objects to be found.
        image: (D,) the image of each detection, counted from 0.
        found: (T, D) whether it found an object.
        counts: (T, D) whether it counts: those that found an ignored object do not.
    """

    category: int
    objects: np.ndarray
    image: np.ndarray
    found: np.ndarray
    counts: np.ndarray


class Crowding(NamedTuple):
    """
    How much there is in each of the images that were evaluated. COCO's limit of detections is one of each category.

    Attributes:
        objects: (I,) to be found.
        detections: (I,) that the model gave.
        objects_of_one: (I,) of the category that has most.
        detections_of_one: (I,) of the category that has most.
    """

    objects: np.ndarray
    detections: np.ndarray
    objects_of_one: np.ndarray
    detections_of_one: np.ndarray


class InstanceEvaluator(COCOEvaluator):
    """
    Detectron2's ``COCOEvaluator``, which keeps what AP is made of, so that images can be drawn again. Where a model
    finds nothing and there is something to find, its AP is 0 (Detectron2 has nan).

    Args:
        args, options: as for ``COCOEvaluator``. Evaluation is pycocotools' whatever ``use_fast_impl`` says: the fast
            one does not tell what it matched.
        sides: also keep what AP is made of for objects of some sizes alone: between these sides in pixels, the square
            roots of areas. COCO's small, medium and large are (32, 96).

    Raises:
        InputError: for sides that do not grow, and ``max_dets_per_image`` under 10.
    """

    _tasks: Any  # Detectron2's, a sequence or None

    def __init__(self, *args: Any, sides: Sequence[float] = (), **options: Any):
        self.set_sides(sides)
        super().__init__(*args, **options)
        # Detectron2 gives COCO the limits 1, 10 and this one, of which COCO then takes the highest.
        check_count("max_dets_per_image", self.max_detections, 10)
        self._use_fast_impl = False
        self._classes = name_classes(
            {id: str(category.get("name", id)) for id, category in sorted(self._coco_api.cats.items())}
        )

    def set_sides(self, sides: Sequence[float]) -> None:
        """
        Set the argument `sides`, before :meth:`reset`.

        Raises:
            InputError: for sides that do not grow.
        """
        if list(sides) != sorted(set(sides)) or any(side <= 0 for side in sides):
            raise InputError(f"sides must be increasing numbers of pixels over 0, got {list(sides)}")
        self.sides = tuple(sides)
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
        #: What there is in the images, after evaluation.
        self.crowding: Crowding | None = None
        self._prediction_of: dict[Any, dict[str, Any]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for input, output in zip(inputs, outputs):
            before = len(self._predictions)
            super().process([input], [output])
            for prediction in self._predictions[before:]:
                self._prediction_of[prediction["image_id"]] = prediction
                # Where none are given, tasks are what detections have: an empty list of them does not say.
                if self._tasks is None and "instances" in output:
                    has = output["instances"].has
                    prediction["tasks"] = ["bbox", *(task for task, field in FIELDS.items() if has(field))]

    def dump(self, image_id: Any) -> dict[str, Any] | None:
        """
        What :meth:`process` kept of an image, for JSON; None where the model's output had nothing to evaluate. Floats
        come back as they are.
        """
        prediction = self._prediction_of.get(image_id)
        if prediction is None:
            return None
        record = {key: value for key, value in prediction.items() if key not in ("image_id", "proposals")}
        if "proposals" in prediction:
            proposals = prediction["proposals"]
            record["proposals"] = {
                "image_size": list(proposals.image_size),
                "proposal_boxes": proposals.proposal_boxes.tensor.tolist(),
                "objectness_logits": proposals.objectness_logits.tolist(),
            }
        return record

    def restore(self, image_id: Any, record: dict[str, Any] | None) -> None:
        """Take what :meth:`dump` gave of an image, in the place of :meth:`process`."""
        if record is None:
            return
        prediction = {"image_id": image_id, **record}
        if "proposals" in record:
            proposals = record["proposals"]
            prediction["proposals"] = Instances(
                tuple(proposals["image_size"]),
                proposal_boxes=Boxes(torch.tensor(proposals["proposal_boxes"]).reshape(-1, 4)),
                objectness_logits=torch.tensor(proposals["objectness_logits"]),
            )
        self._prediction_of[image_id] = prediction
        self._predictions.append(prediction)

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        # Detectron2 writes the data set's categories into what it is given, and evaluation may be asked for again.
        predictions = [
            {**prediction, "instances": [dict(instance) for instance in prediction["instances"]]}
            for prediction in predictions
        ]
        self._chosen = list(self._coco_api.imgs) if img_ids is None else list(img_ids)
        self.crowding = self._count(predictions)
        tasks: Any = self._tasks
        if tasks is None:
            self._tasks = sorted({task for prediction in predictions for task in prediction.get("tasks", ())}) or None
        try:
            super()._eval_predictions(predictions, img_ids)
        finally:
            self._tasks = tasks

    def _count(self, predictions: list[dict]) -> Crowding:
        ids = np.unique(self._chosen)
        index = {id: i for i, id in enumerate(ids.tolist())}
        objects = [
            (id, annotation["category_id"])
            for id in index
            for annotation in self._coco_api.imgToAnns.get(id, ())
            if not annotation.get("iscrowd")
        ]
        detections = [
            (prediction["image_id"], instance["category_id"])
            for prediction in predictions
            if prediction["image_id"] in index
            for instance in prediction["instances"]
        ]
        counts = []
        for pairs in (objects, detections):
            total, most = np.zeros(len(ids), int), np.zeros(len(ids), int)
            for (id, _), number in Counter(pairs).items():
                total[index[id]] += number
                most[index[id]] = max(most[index[id]], number)
            counts.append((total, most))
        (all_objects, objects_of_one), (all_detections, detections_of_one) = counts
        return Crowding(all_objects, all_detections, objects_of_one, detections_of_one)

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None) -> dict:
        if coco_eval is None:
            coco_eval = evaluate_without_detections(self, iou_type, self._chosen)
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

    def resample_classes(self, weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """
        Args:
            weights: as for :meth:`resample`.

        Returns:
            "bbox.AP" and "segm.AP", those that were evaluated -> class -> (samples,) in percent, nan where a sample has
            no object of the class.
        """
        figures = {}
        for task, matches in self.matches.items():
            precisions = {category.category: class_precision(category, weights) for category in matches}
            nothing = np.full(len(weights), np.nan)
            figures[f"{task}.AP"] = {name: precisions.get(id, nothing) for id, name in self._classes.items()}
        return figures


def evaluate_without_detections(evaluator: COCOEvaluator, iou_type: str, img_ids: Sequence) -> COCOeval:
    """
    What Detectron2 leaves out where there is no detection at all, as ``loadRes`` takes no empty list.

    Args:
        evaluator: of the data set.
        iou_type: "bbox", "segm" or "keypoints".
        img_ids: the images that are evaluated.

    Returns:
        after ``summarize()``: 0 where there is something to find, -1 where there is not.
    """
    nothing = COCO()
    nothing.dataset = {**evaluator._coco_api.dataset, "annotations": []}
    limits = evaluator._max_dets_per_image
    with contextlib.redirect_stdout(io.StringIO()):
        nothing.createIndex()
        coco_eval = (COCOeval if limits[-1] == 100 else COCOevalMaxDets)(evaluator._coco_api, nothing, iou_type)
        coco_eval.params.imgIds = list(img_ids)
        if iou_type != "keypoints":
            coco_eval.params.maxDets = limits
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval


def complete_accuracy(
    evaluators: Sequence[DatasetEvaluator], accuracy: dict[str, dict[str, float]], img_ids: Sequence | None
) -> None:
    """
    Write the zeros into ``accuracy`` that Detectron2's own ``COCOEvaluator`` gives as nan where a model found nothing.

    Args:
        evaluators: that gave it.
        accuracy: task -> metric -> figure.
        img_ids: the images that were evaluated; None: all of the data set.
    """
    for evaluator in evaluators:
        if not isinstance(evaluator, COCOEvaluator) or isinstance(evaluator, (InstanceEvaluator, RotatedCOCOEvaluator)):
            continue
        for task in accuracy.keys() & set(getattr(evaluator, "_results", ())):
            if task in ("bbox", *FIELDS) and np.isnan(list(accuracy[task].values())).all():
                chosen = evaluator._coco_api.getImgIds() if img_ids is None else img_ids
                classes = evaluator._metadata.get("thing_classes")
                accuracy[task] = evaluator._derive_coco_results(
                    evaluate_without_detections(evaluator, task, chosen), task, class_names=classes
                )


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
    evaluations = np.empty(len(coco_eval.evalImgs), dtype=object)
    evaluations[:] = coco_eval.evalImgs
    ranges = [tuple(limits) for limits in params.areaRng]
    evaluated = 0 if area is None else ranges.index(area) if area in ranges else None
    evaluations = evaluations.reshape(-1, len(params.areaRng), images)[:, evaluated or 0]
    categories = []
    for category, results in zip(params.catIds, evaluations):
        if evaluated is None:
            results = [coco_eval.evaluateImg(image, category, area, most) for image in params.imgIds]
        objects = np.array([0 if result is None else int(np.sum(result["gtIgnore"] == 0)) for result in results])
        if not objects.any():
            continue
        numbered = [(i, result) for i, result in enumerate(results) if result is not None]
        score = np.concatenate([result["dtScores"][:most] for _, result in numbered])
        order = np.argsort(-score, kind="mergesort")  # as COCO's, for equal scores
        matched = np.concatenate([result["dtMatches"][:, :most] for _, result in numbered], axis=1)[:, order] > 0
        ignored = np.concatenate([result["dtIgnore"][:, :most] for _, result in numbered], axis=1)[:, order] > 0
        image = np.concatenate([np.full(len(result["dtScores"][:most]), i) for i, result in numbered])[order]
        categories.append(Matches(category, objects, image, matched & ~ignored, ~ignored))
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
    return mean_of_classes((class_precision(category, weights) for category in categories), len(weights))


def class_precision(category: Matches, weights: np.ndarray) -> np.ndarray:
    """As :func:`average_precision`, of one category."""
    objects = weights @ category.objects
    times = weights[:, category.image]
    mean = np.zeros(len(weights))
    counts, detections = None, np.zeros(0)
    for true_positives, counted in zip(category.found, category.counts):
        if counts is None or (counted != counts).any():  # the same at most thresholds
            counts, detections = counted, np.cumsum(times * counted, axis=1)
        # Precision falls between two that find something, so that only these are looked at.
        true = np.cumsum(times[:, true_positives], axis=1)
        recall = true / np.maximum(objects, 1)[:, None]
        precision = true / np.maximum(detections[:, true_positives], 1)
        # The best precision at this recall or a higher one; 0 where it is not reached.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))
        for sample in range(len(weights)):
            mean[sample] += precision[sample, np.searchsorted(recall[sample], RECALLS)].mean()
    return np.where(objects > 0, 100 * mean / len(category.found), np.nan)
