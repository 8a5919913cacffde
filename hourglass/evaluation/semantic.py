"""
The accuracy of semantic segmentation, with intervals.

Letters: K classes, I images.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image

from hourglass.errors import InputError
from hourglass.evaluation.resampling import check_evaluated, mean_of_classes, name_classes

COUNTS = ("truth", "predicted", "both")


def count_pixels(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """
    The sums of an image's confusion matrix that every figure is made of.

    Args:
        truth: (H, W) integers, a class at each pixel; `classes` or more where there is none.
        predicted: (H, W) integers from 0 to `classes` - 1.
        classes: how many there are.

    Returns:
        (3, K) int64: of the pixels that have a class, how many are of each class, how many are predicted to be, and how
        many are both.
    """
    truth, predicted = truth.reshape(-1), predicted.reshape(-1)
    labelled = truth < classes
    if not labelled.all():
        truth, predicted = truth[labelled], predicted[labelled]
    right = truth[truth == predicted]
    return np.stack([np.bincount(pixels, minlength=classes) for pixels in (truth, predicted, right)])


def class_figures(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
        counts: (..., 3, K), :func:`count_pixels` summed over images.

    Returns:
        (..., K) intersection over union and (..., K) accuracy, in percent, of each class; nan for those that the ground
        truth lacks.
    """
    truth, predicted, intersection = (counts[..., i, :].astype(float) for i in range(len(COUNTS)))
    truth = np.where(truth > 0, truth, np.nan)
    return 100 * intersection / (truth + predicted - intersection), 100 * intersection / truth


def semantic_figures(counts: np.ndarray) -> dict[str, float]:
    """
    Args:
        counts: (3, K), :func:`count_pixels` summed over images.

    Returns:
        in percent "mIoU", the mean over the classes that the ground truth has; "fwIoU", the mean weighted by their
        pixels there; "mACC", the mean over classes of the share of their pixels that is right; "pACC", the share of all
        pixels. nan where the ground truth has no class.
    """
    iou, accuracy = class_figures(counts)
    truth, _, intersection = counts.astype(float)
    total = truth.sum() if truth.any() else np.nan
    return {
        "mIoU": float(mean_of_classes(iou[:, None], 1)[0]),
        "fwIoU": float(np.nansum(iou * truth / total)) if truth.any() else np.nan,
        "mACC": float(mean_of_classes(accuracy[:, None], 1)[0]),
        "pACC": float(100 * intersection.sum() / total),
    }


class SemanticEvaluator(DatasetEvaluator):
    """
    The figures of Detectron2's ``SemSegEvaluator`` from ``output["sem_seg"]``, (C, H, W) logits, kept by image, so that
    images can be drawn again. Classes that are predicted where the ground truth lacks them are no part of the mean IoU,
    as on Detectron2's main branch: all models are compared over the same classes.

    Args:
        dataset_name: a registered data set, whose records have "sem_seg_file_name" and whose metadata have
            "stuff_classes" and "ignore_label".

    Raises:
        InputError: for a data set without these; from ``process``, for outputs and PNGs that do not fit it.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        # Before the metadata: loading the data set may fill them.
        records = DatasetCatalog.get(dataset_name)
        for key in ("stuff_classes", "ignore_label"):
            if metadata.get(key) is None:
                raise InputError(f"data set {dataset_name!r} has no {key!r} in its metadata: it must be a semantic one")
        without = [record["file_name"] for record in records if "sem_seg_file_name" not in record]
        if without:
            images = f"{len(without)} of the {len(records)} images of data set {dataset_name!r}"
            raise InputError(f"{images} have no 'sem_seg_file_name', such as {without[0]}: ground truth is needed")
        self._truth = {record["file_name"]: record["sem_seg_file_name"] for record in records}
        self._ignored = metadata.ignore_label
        self._classes = list(name_classes(dict(enumerate(metadata.stuff_classes))).values())
        self._name = dataset_name
        self.reset()

    def reset(self) -> None:
        # Image id -> (n,) the classes that it has, and (3, n) their counts: few of many classes.
        self._counts: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self._not_finite: list[Any] = []
        #: The images that were evaluated, in the main process.
        self.image_ids: list[Any] = []
        self._evaluated = np.zeros((0, len(COUNTS), len(self._classes)))
        #: What is to be said of the figures, in the main process after evaluation.
        self.warnings: list[str] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for input, output in zip(inputs, outputs):
            image_id = input["image_id"]
            if "sem_seg" not in output:
                raise InputError(f"the model gives no 'sem_seg' to evaluate, its output has {sorted(output)}")
            if input["file_name"] not in self._truth:
                raise InputError(f"image {image_id!r}, {input['file_name']}, is not in data set {self._name!r}")
            logits = output["sem_seg"]
            if len(logits) != len(self._classes):
                mismatch = f"{len(logits)} classes, data set {self._name!r} has {len(self._classes)}"
                raise InputError(f"image {image_id!r}: the model's 'sem_seg' has {mismatch}")
            predicted = logits.argmax(dim=0)
            # Where a logit is nan or inf, so is the highest.
            if not torch.isfinite(logits.gather(0, predicted[None]).sum(dtype=torch.float64)):
                self._not_finite.append(image_id)
            predicted = predicted.cpu().numpy()
            truth = self._read_truth(self._truth[input["file_name"]])
            if truth.shape != predicted.shape:
                sizes = [" x ".join(map(str, array.shape)) for array in (predicted, truth)]
                raise InputError(f"image {image_id!r}: the prediction is {sizes[0]}, the ground truth {sizes[1]}")
            counts = count_pixels(truth, predicted, len(self._classes))
            present = np.flatnonzero(counts.any(axis=0))
            self._counts[image_id] = (present, counts[:, present])

    def _read_truth(self, path: str) -> np.ndarray:
        """(H, W) int64 classes; where there is none, the number of classes."""
        try:
            with PathManager.open(path, "rb") as file:
                classes = np.array(Image.open(file))
        except FileNotFoundError as error:
            raise InputError(f"semantic PNG {path} is missing") from error
        except (OSError, SyntaxError) as error:  # Pillow raises either for bad files
            reason = str(error).split("\n")[0]
            raise InputError(f"semantic PNG {path} cannot be read ({type(error).__name__}: {reason})") from error
        if classes.ndim != 2:
            raise InputError(f"semantic PNG {path} is {classes.shape}: it must have one channel of class ids")
        classes = classes.astype(np.int64)
        ignored = classes == self._ignored
        classes[ignored] = len(self._classes)
        wrong = (classes < 0) | ((classes >= len(self._classes)) & ~ignored)
        if wrong.any():
            accepted = f"0 to {len(self._classes) - 1}, and {self._ignored} where there is none"
            value = classes[wrong][0]
            raise InputError(f"semantic PNG {path} has class {value}: data set {self._name!r} has {accepted}")
        return classes

    def dump(self, image_id: Any) -> dict[str, Any]:
        """What :meth:`process` counted in an image, for JSON."""
        present, counts = self._counts[image_id]
        return {
            "classes": present.tolist(),
            **dict(zip(COUNTS, counts.tolist())),
            "finite": image_id not in self._not_finite,
        }

    def restore(self, image_id: Any, record: dict[str, Any]) -> None:
        """Take what :meth:`dump` gave of an image, in the place of :meth:`process`."""
        counts = np.array([record[name] for name in COUNTS], np.int64).reshape(len(COUNTS), -1)
        self._counts[image_id] = (np.array(record["classes"], np.int64), counts)
        if not record["finite"]:
            self._not_finite.append(image_id)

    def evaluate(self, img_ids: Sequence | None = None) -> dict[str, dict[str, float]]:
        """
        Args:
            img_ids: evaluate only these images; None: all that were run.

        Returns:
            {"sem_seg": figures}: those of :func:`semantic_figures`, and "IoU-name" and "ACC-name" of each class; empty
            in all but the main process.

        Raises:
            InputError: for images to be evaluated that no process has seen.
        """
        shares = comm.gather((self._counts, self._not_finite))
        if not comm.is_main_process():
            return {}
        counts = {image_id: image_counts for share, _ in shares for image_id, image_counts in share.items()}
        chosen = list(counts) if img_ids is None else list(img_ids)
        self.image_ids = check_evaluated(self._name, chosen, counts)
        self._evaluated = np.zeros((len(chosen), len(COUNTS), len(self._classes)), np.int32)
        for i, image_id in enumerate(self.image_ids):
            present, values = counts[image_id]
            self._evaluated[i][:, present] = values
        not_finite = len({image_id for _, share in shares for image_id in share} & set(chosen))
        self.warnings = []
        if not_finite:
            self.warnings.append(f"'sem_seg' is not finite in {not_finite} of {len(chosen)} images")
        total = self._evaluated.sum(axis=0, dtype=np.int64)
        iou, accuracy = class_figures(total)
        figures = semantic_figures(total)
        for prefix, values in (("IoU", iou), ("ACC", accuracy)):
            figures.update({f"{prefix}-{name}": float(value) for name, value in zip(self._classes, values)})
        return OrderedDict({"sem_seg": figures})

    def resample(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            weights: (samples, I), how often each of `image_ids` is in a sample.

        Returns:
            {"sem_seg.mIoU": (samples,)} in percent.
        """
        (classes,) = self.resample_classes(weights).values()
        return {"sem_seg.mIoU": mean_of_classes(classes.values(), len(weights))}

    def resample_classes(self, weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """
        Args:
            weights: as for :meth:`resample`.

        Returns:
            {"sem_seg.mIoU": class -> (samples,)}: each class's IoU in percent, nan where a sample's ground truth lacks
            the class.
        """
        images = self._evaluated.reshape(len(self._evaluated), -1).astype(float)  # products of integers are slow
        iou, _ = class_figures((weights.astype(float) @ images).reshape(len(weights), len(COUNTS), -1))
        return {"sem_seg.mIoU": dict(zip(self._classes, iou.T))}
