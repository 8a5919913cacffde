"""
Panoptic quality (Kirillov et al., Panoptic Segmentation, arXiv 1801.00868), counted as panopticapi counts it.

Letters: G segments in the ground truth of an image, P in the prediction, K categories.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from hourglass.data.panoptic import read_panoptic_json, read_panoptic_png, segment_ids
from hourglass.errors import InputError
from hourglass.evaluation.resampling import check_evaluated, mean_of_classes, name_classes

VOID = 0
COUNTS = ("iou", "tp", "fp", "fn")


def count_segments(
    truth: np.ndarray,
    truth_info: Sequence[dict[str, Any]],
    predicted: np.ndarray,
    predicted_info: Sequence[dict[str, Any]],
    categories: Sequence[int],
) -> np.ndarray:
    """
    Match the segments of one image.

    A predicted segment matches one of the same category, unless that is a crowd, where their IoU is over 0.5; pixels
    without ground truth are left out of the union. A prediction that matches nothing is false, unless more than half of
    it lies on pixels without ground truth and the crowd of its category (the last in `truth_info`, where there are
    several). Crowds are never missed.

    Args:
        truth: (H, W) integers, a segment's id at its pixels, 0 where there is none.
        truth_info: a dictionary a segment: "id", "category_id" and "iscrowd", which is 0 where it is missing. Areas are
            counted from the map.
        predicted: (H, W) integers, as `truth`.
        predicted_info: a dictionary a segment: "id" and "category_id".
        categories: (K,) category ids.

    Returns:
        (K, 4) float64: the sum of the matches' IoU, and the numbers of matches, of false and of missed segments.

    Raises:
        InputError: for maps of different sizes, a predicted segment that only one of the map and the info has, ids that
            several segments have, and categories that are none.
    """
    if truth.shape != predicted.shape:
        raise InputError(f"the prediction is {_size(predicted)}, the panoptic ground truth {_size(truth)}")
    index = {category: i for i, category in enumerate(categories)}
    truth_class = _classes("ground truth", truth_info, index)
    predicted_class = _classes("prediction", predicted_info, index)
    if predicted.size and predicted.min() < 0:
        raise InputError(f"a prediction's segment ids must be at least 0, which stands for none, got {predicted.min()}")

    # Joint histogram; row 0 and column 0 are void. What the ground truth's info does not know is in no row.
    offset = int(predicted.max(initial=0)) + 1
    pairs, pixels = np.unique(truth.astype(np.int64) * offset + predicted, return_counts=True)
    rows = _positions(pairs // offset, truth_info)
    columns = _positions(pairs % offset, predicted_info)
    if (columns < 0).any():
        unknown = pairs[columns < 0][0] % offset
        raise InputError(f"the prediction has segment {unknown} in its map, not in segments_info")
    area = np.bincount(columns, pixels, len(predicted_info) + 1)[1:]
    if not area.all():
        absent = predicted_info[int(area.argmin())]["id"]
        raise InputError(f"the prediction has segment {absent} in segments_info, not in its map")
    overlap = np.zeros((len(truth_info) + 1, len(predicted_info) + 1))
    overlap[rows[rows >= 0], columns[rows >= 0]] = pixels[rows >= 0]

    crowd = np.array([segment.get("iscrowd", 0) == 1 for segment in truth_info], bool)
    truth_area = overlap[1:].sum(axis=1)
    void = overlap[0, 1:]
    union = truth_area[:, None] + area - overlap[1:, 1:] - void
    iou = overlap[1:, 1:] / np.maximum(union, 1)  # a union of nothing has no overlap either
    match = (truth_class[:, None] == predicted_class) & ~crowd[:, None] & (iou > 0.5)

    crowd_row = np.zeros(len(categories), int)
    crowd_row[truth_class[crowd]] = np.flatnonzero(crowd) + 1  # the last one stays
    row = crowd_row[predicted_class]
    ignored = void + np.where(row > 0, overlap[row, np.arange(1, len(predicted_info) + 1)], 0)
    false = ~match.any(axis=0) & (ignored / area <= 0.5)
    missed = ~match.any(axis=1) & ~crowd

    matched, _ = np.nonzero(match)
    return np.stack(
        [
            np.bincount(truth_class[matched], iou[match], len(categories)),
            np.bincount(truth_class[matched], minlength=len(categories)),
            np.bincount(predicted_class[false], minlength=len(categories)),
            np.bincount(truth_class[missed], minlength=len(categories)),
        ],
        axis=1,
    )


def panoptic_quality(counts: np.ndarray, isthing: Sequence[bool]) -> dict[str, float]:
    """
    Args:
        counts: (K, 4), the sum of :func:`count_segments` over images.
        isthing: (K,)

    Returns:
        "PQ", "SQ" and "RQ" in percent, averaged over the categories that occur in ground truth or prediction; so ending
        in "_th" over things, in "_st" over stuff; nan where no such category occurs.
    """
    per_category = quality_of_categories(counts)
    occurs = ~np.isnan(per_category["PQ"])
    is_thing = np.asarray(isthing, bool)
    return {
        f"{name}{suffix}": float(values[group].mean()) if group.any() else float("nan")
        for suffix, group in (("", occurs), ("_th", occurs & is_thing), ("_st", occurs & ~is_thing))
        for name, values in per_category.items()
    }


def quality_of_categories(counts: np.ndarray) -> dict[str, np.ndarray]:
    """
    Args:
        counts: (..., K, 4) as for :func:`panoptic_quality`.

    Returns:
        "PQ", "SQ" and "RQ" -> (..., K) in percent; nan for a category that neither ground truth nor prediction has.
    """
    iou, tp, fp, fn = np.moveaxis(counts, -1, 0)
    occurs = tp + fp + fn > 0
    detected = np.where(occurs, tp + fp / 2 + fn / 2, np.nan)
    return {
        "PQ": 100 * iou / detected,
        "SQ": np.where(occurs, 100 * iou / np.maximum(tp, 1), np.nan),
        "RQ": 100 * tp / detected,
    }


class PanopticEvaluator(DatasetEvaluator):
    """
    Panoptic quality of ``output["panoptic_seg"]``: the map of segment ids (H, W), and a dictionary a segment with "id",
    "category_id" and "isthing" (contiguous ids, as for Detectron2's own evaluator, which needs panopticapi), or None in
    the place of these where the map holds category * label_divisor + instance, and -1 where there is none.

    Args:
        dataset_name: a registered data set, with Detectron2's metadata of a panoptic one.

    Raises:
        InputError: for a data set that is not panoptic, or whose JSON is missing or wrong; from ``process``, for a PNG
            that is.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        thing_ids, stuff_ids = "thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"
        for key in ("panoptic_json", "panoptic_root", thing_ids, stuff_ids):
            if metadata.get(key) is None:
                raise InputError(f"data set {dataset_name!r} has no {key!r} in its metadata: it must be a panoptic one")
        self._truth = read_panoptic_json(metadata.panoptic_json)
        self._root = metadata.panoptic_root
        self._thing_ids = {contiguous: id for id, contiguous in getattr(metadata, thing_ids).items()}
        self._stuff_ids = {contiguous: id for id, contiguous in getattr(metadata, stuff_ids).items()}
        self._isthing = [category["isthing"] for category in self._truth.categories.values()]
        self._classes = name_classes({id: category["name"] for id, category in self._truth.categories.items()})
        self._label_divisor = metadata.get("label_divisor")
        self._name = dataset_name
        self.reset()

    def _path(self, annotation: dict[str, Any]) -> str:
        return os.path.join(self._root, annotation["file_name"])

    def reset(self) -> None:
        #: Image id -> (K, 4) counts, of the images that this process has seen.
        self.counts: dict[Any, np.ndarray] = {}
        #: The images that were evaluated, and their counts (images, K, 4), in the main process.
        self.image_ids: list[Any] = []
        self._evaluated = np.zeros((0, len(self._truth.categories), len(COUNTS)))

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for input, output in zip(inputs, outputs):
            image_id = input["image_id"]
            if "panoptic_seg" not in output:
                raise InputError(f"the model gives no 'panoptic_seg' to evaluate, its output has {sorted(output)}")
            if image_id not in self._truth.annotations:
                raise InputError(f"image {image_id!r} is not in the panoptic JSON of data set {self._name!r}")
            annotation = self._truth.annotations[image_id]
            try:
                predicted, predicted_info = self._prediction(*output["panoptic_seg"])
                self.counts[image_id] = count_segments(
                    self._read_truth(annotation),
                    annotation["segments_info"],
                    predicted,
                    predicted_info,
                    list(self._truth.categories),
                )
            except InputError as error:
                raise InputError(f"image {image_id!r} of data set {self._name!r}: {error}") from error

    def dump(self, image_id: Any) -> list[list[float]]:
        """
        What :meth:`process` counted in an image, for JSON: of each category that has any, its place in the order of ids
        and its counts. Floats come back as they are.
        """
        counts = self.counts[image_id]
        return [[category, *counts[category].tolist()] for category in np.flatnonzero(counts.any(axis=1)).tolist()]

    def restore(self, image_id: Any, record: list[list[float]]) -> None:
        """Take what :meth:`dump` gave of an image, in the place of :meth:`process`."""
        counts = np.zeros(self._evaluated.shape[1:])
        for category, *values in record:
            counts[int(category)] = values
        self.counts[image_id] = counts

    def _prediction(self, segments: Any, info: list[dict] | None) -> tuple[np.ndarray, list[dict[str, int]]]:
        ids = segments.cpu().numpy().astype(np.int64)
        if info is None:
            if self._label_divisor is None:
                raise InputError("a prediction without segments_info needs a 'label_divisor' in the metadata")
            ids += 1  # now 0 is void
            labelled = [(id, (id - 1) // self._label_divisor) for id in np.unique(ids).tolist() if id != VOID]
            info = [{"id": id, "category_id": kind, "isthing": kind in self._thing_ids} for id, kind in labelled]
        return ids, [{"id": segment["id"], "category_id": self._category(segment)} for segment in info]

    def _category(self, segment: dict[str, Any]) -> int:
        isthing, category = segment.get("isthing"), segment["category_id"]
        if isthing is None:
            return category  # the data set's own id already
        ids = self._thing_ids if isthing else self._stuff_ids
        if category not in ids:
            kind = "thing" if isthing else "stuff"
            raise InputError(f"the prediction has a {kind} of category {category}, the data set {sorted(ids)}")
        return ids[category]

    def _read_truth(self, annotation: dict[str, Any]) -> np.ndarray:
        """(H, W) int64 segment ids, which agree with their info."""
        path = self._path(annotation)
        ids = segment_ids(read_panoptic_png(path))
        present = set(np.unique(ids).tolist()) - {VOID}
        expected = {segment["id"]: segment for segment in annotation["segments_info"]}
        unknown = present - set(expected)
        if unknown:
            problem = f"{len(unknown)} segment ids that its segments_info lacks, such as {min(unknown)}"
            raise InputError(f"panoptic PNG {path} has {problem}")
        # Things may hide all of a stuff (they do in ADE20K as Mask2Former prepares it): that one is missed.
        things = {id for id, segment in expected.items() if self._truth.categories[segment["category_id"]]["isthing"]}
        absent = things - present
        if absent:
            problem = f"{len(absent)} of the things in its segments_info, such as segment {min(absent)}"
            raise InputError(f"panoptic PNG {path} lacks {problem}")
        return ids

    def evaluate(self, img_ids: Sequence | None = None) -> dict[str, dict[str, float]]:
        """
        Args:
            img_ids: evaluate only these images; None: all of the data set.

        Returns:
            {"panoptic_seg": figures}, those of :func:`panoptic_quality`; empty in all but the main process.

        Raises:
            InputError: for images to be evaluated that no process has seen.
        """
        shares = comm.gather(self.counts)
        if not comm.is_main_process():
            return {}
        counts = {image_id: image_counts for share in shares for image_id, image_counts in share.items()}
        chosen = list(self._truth.annotations) if img_ids is None else list(img_ids)
        self.image_ids = check_evaluated(self._name, chosen, counts)
        self._evaluated = np.array([counts[image_id] for image_id in self.image_ids]).reshape(
            -1, *self._evaluated.shape[1:]
        )
        return OrderedDict({"panoptic_seg": panoptic_quality(self._evaluated.sum(0), self._isthing)})

    def resample(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            weights: (samples, images), how often each of `image_ids` is in a sample.

        Returns:
            {"panoptic_seg.PQ": (samples,)} in percent.
        """
        (classes,) = self.resample_classes(weights).values()
        return {"panoptic_seg.PQ": mean_of_classes(classes.values(), len(weights))}

    def resample_classes(self, weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """
        Args:
            weights: as for :meth:`resample`.

        Returns:
            {"panoptic_seg.PQ": class -> (samples,)} in percent, nan where a sample has nothing of the class.
        """
        quality = quality_of_categories(np.tensordot(weights, self._evaluated, 1))["PQ"]
        return {"panoptic_seg.PQ": dict(zip(self._classes.values(), quality.T))}


def _size(segments: np.ndarray) -> str:
    return " x ".join(str(length) for length in segments.shape)


def _classes(name: str, info: Sequence[dict[str, Any]], index: dict[int, int]) -> np.ndarray:
    """Indices of the segments' categories."""
    ids = set()
    for segment in info:
        if segment["id"] in ids:
            raise InputError(f"the {name} has segment {segment['id']} twice in segments_info: ids must be distinct")
        ids.add(segment["id"])
        if segment["category_id"] not in index:
            name = f"segment {segment['id']} of the {name}"
            raise InputError(f"{name} has category_id {segment['category_id']}, which is none of {list(index)}")
        if segment["id"] == VOID:
            raise InputError(f"segment ids must be at least 1 (0 stands for none), the {name} has segment 0")
    return np.array([index[segment["category_id"]] for segment in info], int)


def _positions(ids: np.ndarray, info: Sequence[dict[str, Any]]) -> np.ndarray:
    """Where in `info` each id is, from 1; 0 for void and -1 for an id that is not there."""
    segment_ids = np.array([VOID, *(segment["id"] for segment in info)])
    order = segment_ids.argsort(kind="stable")
    position = order[np.searchsorted(segment_ids, ids, sorter=order).clip(max=len(segment_ids) - 1)]
    return np.where(segment_ids[position] == ids, position, -1)
