"""
Agreement of two models: AP, PQ and mIoU of one model's output with the other's output as ground truth. It needs no
labels.

It ranks similar models better than labels of as many images do, as every changed mask counts, where a difference of AP
by one per cent is lost in noise. It is not the share of accuracy that is kept but lower, as some of the outputs that
change were wrong before.
"""

import contextlib
import io
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils import comm
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hourglass.errors import InputError
from hourglass.evaluation.instances import Matches, average_precision, read_matches
from hourglass.evaluation.panoptic import count_segments, quality_of_categories
from hourglass.evaluation.resampling import mean_of_classes
from hourglass.evaluation.semantic import class_figures, count_pixels

#: Detections of the first model over this score are its truth.
SCORE = 0.7
_NARROW = (np.uint8, np.uint16)


class _Map(NamedTuple):
    """Integers (H, W), compressed. Of one or two bytes where all fit, which reads three times as fast as four."""

    size: tuple[int, int]
    content: bytes

    @classmethod
    def from_tensor(cls, values: torch.Tensor) -> "_Map":
        array = values.detach().cpu().numpy()
        largest = int(array.max(initial=0))
        kind = next((kind for kind in _NARROW if largest <= np.iinfo(kind).max and array.min(initial=0) >= 0), np.int32)
        array = np.ascontiguousarray(array.astype(kind))
        return cls(array.shape, zlib.compress(array.data, 1))

    def read(self) -> np.ndarray:
        """(H, W) int32"""
        content = zlib.decompress(self.content)
        kinds = {np.dtype(kind).itemsize: kind for kind in (*_NARROW, np.int32)}
        kind = kinds[len(content) // max(1, int(np.prod(self.size)))] if content else np.int32
        return np.frombuffer(content, kind).reshape(self.size).astype(np.int32, copy=False)


class OutputRecorder(DatasetEvaluator):
    """
    Keeps a model's outputs, to be compared with another's: boxes, masks, panoptic segments and classes of pixels. It
    has no figures of its own.

    Args:
        max_detections: of an image and a class, those with the highest scores; None: all that the model gives.
        compared: whether a comparison is to tell how far it agrees with the first model's.
        lowest: detections of a lower score are not kept.
    """

    def __init__(self, max_detections: int | None = None, compared: bool = True, lowest: float = 0.0):
        self.max_detections = max_detections
        self.compared = compared
        self.lowest = lowest
        self.reset()

    def reset(self) -> None:
        #: Image id -> kind of output -> what was kept.
        self.outputs: dict[Any, dict[str, Any]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for input, output in zip(inputs, outputs):
            self.outputs[input["image_id"]] = _kept_output(output, self.lowest)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Nothing; the main process has the outputs of all afterwards."""
        shares = comm.gather(self.outputs)
        self.outputs = {image_id: kept for share in shares for image_id, kept in share.items()}
        return {}

    def dump(self, image_id: Any) -> dict[str, Any]:
        """What :meth:`process` kept of an image, for MessagePack. Floats come back as they are."""
        kept = dict(self.outputs[image_id])
        for key in ("scores", "classes", "bbox"):
            if key in kept:
                kept[key] = kept[key].tolist()
        return kept

    def restore(self, image_id: Any, record: dict[str, Any]) -> None:
        """Take what :meth:`dump` gave of an image, in the place of :meth:`process`."""
        kept = dict(record)
        if "size" in kept:
            kept["size"] = tuple(kept["size"])
        for key, kind in (("scores", float), ("classes", int), ("bbox", float)):
            if key in kept:
                kept[key] = np.array(kept[key], kind).reshape((-1, 4) if key == "bbox" else -1)
        for key in ("panoptic_seg", "sem_seg"):
            if key in kept:
                (size, content), about = kept[key]
                kept[key] = _Map(tuple(size), content), about
        self.outputs[image_id] = kept


def recording(evaluators: Sequence[DatasetEvaluator], compared: bool = True, lowest: float = 0.0) -> DatasetEvaluators:
    """
    These evaluators, and an :class:`OutputRecorder`, of as many detections as the first of them takes; the others as
    there. Where none has a limit, neither has the recorder.
    """
    limits = [evaluator.max_detections for evaluator in evaluators if hasattr(evaluator, "max_detections")]
    return DatasetEvaluators([*evaluators, OutputRecorder(limits[0] if limits else None, compared, lowest)])


def _kept_output(output: dict[str, Any], lowest: float) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    if "instances" in output:
        instances = output["instances"]
        if lowest > 0:
            instances = instances[instances.scores >= lowest]
        instances = instances.to("cpu")
        kept["size"] = tuple(instances.image_size)
        kept["scores"] = instances.scores.numpy().astype(float)
        kept["classes"] = instances.pred_classes.numpy().astype(int)
        if instances.has("pred_boxes"):
            boxes = instances.pred_boxes.tensor.numpy().astype(float)
            kept["bbox"] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        if instances.has("pred_masks"):
            masks = instances.pred_masks.numpy().astype(np.uint8)
            kept["segm"] = [rle.encode(np.asfortranarray(mask)) for mask in masks]
    if output.get("panoptic_seg") is not None:
        segments, info = output["panoptic_seg"]
        if info is not None:
            kept["panoptic_seg"] = _Map.from_tensor(segments), [_segment(segment) for segment in info]
    if "sem_seg" in output:
        scores = output["sem_seg"]
        kept["sem_seg"] = _Map.from_tensor(scores.argmax(dim=0)), len(scores)
    return kept


def _segment(info: dict[str, Any]) -> dict[str, int]:
    # Things and stuff may count their categories each from 0.
    return {"id": info["id"], "category_id": 2 * info["category_id"] + int(bool(info.get("isthing", True)))}


def agreement(
    first: OutputRecorder,
    second: OutputRecorder,
    image_ids: Sequence[Any],
    weights: np.ndarray,
    score: float = SCORE,
) -> dict[str, np.ndarray]:
    """
    Agreement of a model with the first one.

    Args:
        first, second: what they found.
        image_ids: the images, which both ran on.
        weights: (samples, images), how often each image is in a sample
            (:func:`~hourglass.evaluation.resampling.draw_samples`).
        score: detections of the first model over it are to be found.

    Returns:
        "segm.AP", "bbox.AP", "panoptic_seg.PQ" and "sem_seg.mIoU", those that both have -> (samples,) in percent; nan
        where the first model found nothing.

    Raises:
        InputError: for a score that is no number from 0 to 1, and images that not both ran on.
    """
    if not 0 <= score < 1:
        raise InputError(f"score must be a number from 0 to 1, got {score!r}")
    for name, recorder in (("first", first), ("second", second)):
        missing = [image_id for image_id in image_ids if image_id not in recorder.outputs]
        if missing:
            raise InputError(f"the {name} model did not run on {len(missing)} images, such as {missing[0]!r}")
    pairs = [(first.outputs[image_id], second.outputs[image_id]) for image_id in image_ids]
    figures = {}
    for task in ("bbox", "segm"):
        if pairs and all(task in expected and task in actual for expected, actual in pairs):
            most = max(100, *(len(kept["scores"]) for pair in pairs for kept in pair))
            limit = max(
                most if recorder.max_detections is None else recorder.max_detections for recorder in (first, second)
            )
            figures[f"{task}.AP"] = average_precision(_matches(pairs, task, score, limit), weights)
    if pairs and all("panoptic_seg" in expected and "panoptic_seg" in actual for expected, actual in pairs):
        figures["panoptic_seg.PQ"] = _panoptic(pairs, weights)
    if pairs and all("sem_seg" in expected and "sem_seg" in actual for expected, actual in pairs):
        counts = np.stack([_confusion(expected["sem_seg"], actual["sem_seg"]) for expected, actual in pairs])
        iou, _ = class_figures(np.tensordot(weights, counts, axes=1))
        figures["sem_seg.mIoU"] = mean_of_classes(iou.T, len(weights))
    return figures


def _confusion(first: tuple[_Map, int], second: tuple[_Map, int]) -> np.ndarray:
    return count_pixels(first[0].read(), second[0].read(), first[1])


def _panoptic(pairs: list[tuple[dict, dict]], weights: np.ndarray) -> np.ndarray:
    infos = [kept["panoptic_seg"][1] for pair in pairs for kept in pair]
    categories = sorted({segment["category_id"] for info in infos for segment in info})
    counts = np.stack(
        [
            count_segments(
                expected["panoptic_seg"][0].read(),
                expected["panoptic_seg"][1],
                actual["panoptic_seg"][0].read(),
                actual["panoptic_seg"][1],
                categories,
            )
            for expected, actual in pairs
        ]
    )
    quality = quality_of_categories(np.tensordot(weights, counts, axes=1))["PQ"]
    return mean_of_classes(quality.T, len(weights))


def _matches(pairs: list[tuple[dict, dict]], task: str, score: float, limit: int) -> list[Matches]:
    """COCO's matches of the other model's detections with the first one's over the score."""
    truth: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    classes = set()
    for i, (expected, actual) in enumerate(pairs):
        for kept, into in ((expected, truth), (actual, detections)):
            for j in range(len(kept["scores"])):
                classes.add(int(kept["classes"][j]))
                if into is truth and not kept["scores"][j] > score:
                    continue
                shape = {"bbox": kept["bbox"][j].tolist()} if task == "bbox" else {"segmentation": kept["segm"][j]}
                area = float(np.prod(kept["bbox"][j][2:])) if task == "bbox" else float(rle.area(kept["segm"][j]))
                entry = {**shape, "image_id": i, "category_id": int(kept["classes"][j]), "area": area, "iscrowd": 0}
                into.append({**entry, "id": len(into) + 1, "score": float(kept["scores"][j])})
    with contextlib.redirect_stdout(io.StringIO()):
        sizes = [expected["size"] for expected, _ in pairs]
        sets = [_coco(annotations, sizes, classes) for annotations in (truth, detections)]
        evaluation = (COCOeval if limit == 100 else COCOevalMaxDets)(*sets, task)
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.params.areaRng = evaluation.params.areaRng[:1]  # of all
        evaluation.evaluate()
    return read_matches(evaluation)


def _coco(annotations: list[dict[str, Any]], sizes: Sequence[tuple[int, int]], classes: set[int]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)],
        "annotations": annotations,
        "categories": [{"id": category} for category in sorted(classes)],
    }
    coco.createIndex()
    return coco
