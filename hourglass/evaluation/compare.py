"""Comparing models of the same weights on one data set: accuracy, latency and cost, batch by batch in turn."""

import contextlib
import inspect
import io
import logging
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
)
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from hourglass.compat import size_divisibility
from hourglass.contexts import evaluating
from hourglass.data.opening import square_side
from hourglass.errors import InputError
from hourglass.evaluation.agreement import OutputRecorder, agreement
from hourglass.evaluation.cost import PeakMemory, count_gflops
from hourglass.evaluation.faults import describe_corrections, describe_gaps, describe_weights, find_faults
from hourglass.evaluation.figures import by_class, reported
from hourglass.evaluation.instances import complete_accuracy
from hourglass.evaluation.journal import Journal, dump, members, restore
from hourglass.evaluation.resampling import (
    Difference,
    Interval,
    difference_of_samples,
    draw_samples,
    mean_of_classes,
    ratio_of_medians,
    ratio_of_samples,
)
from hourglass.evaluation.timing import Clock, Run, Stopwatch

logger = logging.getLogger(__name__)


class Subject(NamedTuple):
    """
    A model to be compared.

    Attributes:
        model: takes and returns Detectron2's dictionaries.
        encoder: the part of it that is timed and counted.
        evaluator: of its outputs; several of them as Detectron2's `DatasetEvaluators`.
        dtype: that it runs in, by autocast if not float32; None: that of the comparison.
        compiled: whether the encoder is compiled. Its operations are then not counted, and the parts of encoders are
            not timed in any model, as hooks there would be those of the compiled one too.
        counted: whether the encoder's operations are counted, which takes as long as a few runs.
    """

    model: nn.Module
    encoder: nn.Module
    evaluator: DatasetEvaluator
    dtype: torch.dtype | None = None
    compiled: bool = False
    counted: bool = True


class Measurement(NamedTuple):
    """
    The measurements of one model.

    Attributes:
        accuracy: task -> metric -> figure, from the evaluator; nan where there is none.
        samples: "task.metric" -> (samples,), the figure on samples of the images, the same ones for each model; the
            first sample is the images themselves. Of evaluators that can be resampled.
        runs: part of a :class:`Run` -> (batches,).
        encoder_gflops: of an image, in the first batch; nan for an encoder that is compiled or not counted.
        peak_memory_mb: over all batches; nan where the system does not tell.
        classes: "task.metric" -> class -> (samples,) as `samples`; of evaluators that cannot be resampled the figure of
            the images alone.
        warnings: about the model's figures, a line each.
    """

    accuracy: dict[str, dict[str, float]]
    samples: dict[str, np.ndarray]
    runs: dict[str, np.ndarray]
    encoder_gflops: float
    peak_memory_mb: float
    classes: dict[str, dict[str, np.ndarray]] = {}
    warnings: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int:
        """The images of the largest batch; the last one may have fewer."""
        return int(self.runs["images"].max())

    @property
    def timed(self) -> dict[str, np.ndarray]:
        """The runs on batches of that size; times are reported for these."""
        full_batches = self.runs["images"] == self.batch_size
        return {part: values[full_batches] for part, values in self.runs.items()}

    @property
    def images_per_second(self) -> float:
        """Of batches of that size, from the median of the whole model's time."""
        return float(1000 * self.batch_size / np.median(self.timed["total"]))


class Comparison(NamedTuple):
    """
    Measurements of models on the same images. The first model is what the others are compared with.

    Attributes:
        models: name -> measurement.
        max_detections: number of detections of an image that COCO's evaluation uses; None without COCO's evaluation.
        agreement: name -> "segm.AP" and so on -> (samples,) in percent, agreement of each other model with the first
            (:mod:`hourglass.evaluation.agreement`), for models whose outputs were kept.
    """

    models: dict[str, Measurement]
    max_detections: int | None = None
    agreement: dict[str, dict[str, np.ndarray]] = {}

    def speedup(self, name: str, part: str) -> Interval:
        """How many times faster than the first model ``name`` runs ``part``, "encoder" or "total"."""
        first = next(iter(self.models.values()))
        return ratio_of_medians(first.timed[part], self.models[name].timed[part])

    def retention(self, name: str) -> dict[str, Interval]:
        """
        Share of the first model's AP, PQ or mIoU that ``name`` keeps: "bbox.AP" -> share, nan where there is no figure,
        with a paired bootstrap interval over images, nan where the evaluator cannot be resampled or where there is one
        image.
        """
        first, kept = next(iter(self.models.values())), self.models[name]
        shares = {}
        for task, metrics in first.accuracy.items():
            for figure in reported(task, metrics):
                if not figure.retention:
                    continue
                key = figure.key
                if figure.interval and key in first.samples and key in kept.samples:
                    shares[key] = ratio_of_samples(first.samples[key], kept.samples[key])
                else:
                    total, share = metrics[figure.metric], kept.accuracy.get(task, {}).get(figure.metric, np.nan)
                    shares[key] = Interval(share / total if total > 0 else np.nan, np.nan, np.nan)
        return shares

    def difference_by_class(self, name: str) -> dict[str, dict[str, Difference]]:
        """
        By how many points the figure of each class is higher than the first model's: "bbox.AP" -> class -> difference,
        with a paired bootstrap interval over images; nan as for :meth:`retention`.
        """
        first, compared = next(iter(self.models.values())), self.models[name]
        return {
            key: {
                class_name: difference_of_samples(samples, compared.classes[key][class_name])
                for class_name, samples in classes.items()
                if class_name in compared.classes[key]
            }
            for key, classes in first.classes.items()
            if key in compared.classes
        }

    def warnings(self) -> list[str]:
        """Warnings about the figures; those that are not of all models begin with the models' names."""
        names_by_line: dict[str, list[str]] = {}
        for name, measurement in self.models.items():
            for line in measurement.warnings:
                names_by_line.setdefault(line, []).append(name)
        return [
            line if len(names) == len(self.models) else f"{', '.join(names)}: {line}"
            for line, names in names_by_line.items()
        ]

    def efficiency(self, name: str) -> float:
        """Share of the encoder's time that is not spent on reducing and restoring, at most 1."""
        runs = self.models[name].timed
        return float(np.median(runs["encoder"] - runs["reduction"]) / np.median(runs["encoder"]))


def compare(
    subjects: dict[str, Subject],
    images: Collection[list[dict]],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    warmup: int = 3,
    title: str | None = None,
    journal: Journal | None = None,
) -> Comparison | None:
    """
    Run every model on every batch, in turn and in alternating order, evaluate the outputs and time the runs. Only the
    images that ran are evaluated, also where the evaluators' annotations have more.

    Every process of a distributed job calls this with its share of the images.

    Args:
        subjects: name -> model; the others are compared with the first.
        images: batches of Detectron2's input dictionaries, with a length. Batches may differ in size.
        device: "cuda" or "cpu".
        dtype: float32, or another dtype for autocast.
        warmup: untimed runs of each model on the first batch.
        title: text before the progress bar; None: the names of the models.
        journal: the finished batches of an interrupted run, which `images` do not include, and where further ones are
            recorded; for evaluators that :func:`~hourglass.evaluation.journal.can_dump`. None: an interruption loses
            everything.

    Returns:
        the comparison; None in all processes but the main one.

    Raises:
        InputError: for images without an id, with one that ran already or that the annotations lack, for a model that
            gives fewer outputs than it is given images, and for an evaluator that takes other images than those that
            ran.
        KeyboardInterrupt: with what the journal keeps.
    """
    names = list(subjects)
    broken = {name: describe_weights(subject.model) for name, subject in subjects.items()}
    for name, lines in broken.items():
        for line in lines if comm.is_main_process() else ():  # before hours of images, and again below the table
            logger.warning("%s: %s", name, line)
    with contextlib.nullcontext() if journal is None else journal:
        shares = comm.all_gather(_run(subjects, images, device, dtype, warmup, title, journal))
        image_ids = [image_id for finished, _ in shares for batch in finished for image_id in batch.image_ids]
        repeated = [image_id for image_id, times in Counter(image_ids).items() if times > 1]
        if repeated:
            raise InputError(f"an image must be compared once, got {repeated[0]!r} in more than one process")
        accuracy = {name: _evaluate(subject.evaluator, image_ids) for name, subject in subjects.items()}
        for name, subject in subjects.items():
            complete_accuracy(members(subject.evaluator), accuracy[name], image_ids)
        resampled = {name: _resample(subject.evaluator, accuracy[name]) for name, subject in subjects.items()}
    if not comm.is_main_process():
        return None
    measurements = {}
    padding = _describe_padding([batch for finished, _ in shares for batch in finished])
    for name in names:
        results = [batch.models[name] for finished, _ in shares for batch in finished]
        runs = {part: np.array([getattr(result.run, part) for result in results]) for part in Run._fields}
        samples, classes = resampled[name]
        model, evaluator = subjects[name].model, subjects[name].evaluator
        in_list = isinstance(evaluator, DatasetEvaluators)
        measurements[name] = Measurement(
            accuracy=accuracy[name],
            samples=samples,
            runs=runs,
            encoder_gflops=next(gflops[name] for _, gflops in shares if name in gflops),
            peak_memory_mb=max(result.peak_memory_mb for result in results),
            classes=classes,
            warnings=(
                *broken[name],
                *find_faults(model, members(evaluator), runs["finite"], in_list, runs["images"].max()),
                *describe_corrections(runs["corrected"], runs["images"].max()),
                *describe_gaps(accuracy[name], classes),
                *padding,
            ),
        )
    limits = [getattr(member, "max_detections", None) for member in members(subjects[names[0]].evaluator)]
    limit = next((limit for limit in limits if limit is not None), None)
    return Comparison(measurements, limit, _agreement(subjects, image_ids))


class _Finished(NamedTuple):
    """What is measured of a model on an image."""

    run: Run
    peak_memory_mb: float


class _Batch(NamedTuple):
    """A batch that all models have run on: how many of its images were padded further than they are alone."""

    image_ids: list[Any]
    models: dict[str, _Finished]
    padded: int = 0


def _close(watches: dict[str, Stopwatch]) -> None:
    """Those that are there by then."""
    for watch in watches.values():
        watch.close()


def _run(
    subjects: dict[str, Subject],
    images: Collection[list[dict]],
    device: str,
    dtype: torch.dtype,
    warmup: int,
    title: str | None,
    journal: Journal | None,
) -> tuple[list[_Batch], dict[str, float]]:
    """
    Run the models on this process's batches.

    Returns:
        what was measured; name -> GFLOPs of the encoder on an image of the first batch.
    """
    clock, memory = Clock(device), PeakMemory(device)
    names = list(subjects)
    title = title or f"comparing {' and '.join(names)}"
    for subject in subjects.values():
        subject.evaluator.reset()
    annotated = _annotated_images(subjects[names[0]].evaluator)
    finished, gflops = ([], {}) if journal is None else _read(journal, subjects)
    done = {image_id for batch in finished for image_id in batch.image_ids}
    dtypes = {name: subject.dtype or dtype for name, subject in subjects.items()}
    reduced = next((dtype for dtype in dtypes.values() if dtype != torch.float32), torch.float32)
    with contextlib.ExitStack() as stack:
        for subject in subjects.values():
            stack.enter_context(evaluating(subject.model))
        stack.enter_context(torch.no_grad())
        inside = not any(subject.compiled for subject in subjects.values())
        watches = {name: Stopwatch(subject.model, subject.encoder, clock, inside) for name, subject in subjects.items()}
        stack.callback(_close, watches)
        # One context around all runs: what it casts of the weights is kept while it lasts, for each model alike.
        stack.enter_context(torch.autocast(device, reduced, enabled=reduced != torch.float32))

        def run(name: str, inputs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Run]:
            with torch.autocast(device, reduced, enabled=dtypes[name] != torch.float32):
                return watches[name].run(inputs)

        warm = False
        bar = tqdm(images, desc=title, unit="image", disable=not comm.is_main_process(), initial=len(finished))
        bar.total = len(images) + len(finished)
        for inputs in bar:
            if len(inputs) > 1:
                bar.unit = "batch"
            image_ids = _check_images(inputs, annotated, done)
            for name in [] if warm else names * warmup:
                run(name, inputs)
            warm = True
            measured: dict[str, _Finished] = {}
            dumps: dict[str, list[list[Any]]] = {}
            # In alternating order, wherever an interruption left it.
            for name in names if len(finished) % 2 == 0 else reversed(names):
                memory.reset()
                outputs, times = run(name, inputs)
                measured[name] = _Finished(times, memory.read())
                if len(outputs) != len(inputs):
                    raise InputError(f"{name} gave {len(outputs)} outputs of a batch of {len(inputs)} images")
                dumps[name] = []
                # One at a time: Detectron2's own evaluator tells what it kept of the last one.
                for image_id, *pair in zip(image_ids, inputs, outputs):
                    subjects[name].evaluator.process(*([item] for item in pair))
                    if journal is not None:
                        dumps[name].append([dump(member, image_id) for member in members(subjects[name].evaluator)])
            if not finished:
                for name, subject in subjects.items():
                    watches[name].close()
                    if subject.compiled or not subject.counted:
                        gflops[name] = float("nan")
                    else:
                        with torch.autocast(device, enabled=False):
                            gflops[name] = count_gflops(subject.encoder, watches[name].encoder_input) / len(inputs)
                    watches[name] = Stopwatch(subject.model, subject.encoder, clock, inside)
            padded = _count_padded(subjects[names[0]].model, inputs)
            finished.append(_Batch(image_ids, measured, padded))
            done.update(image_ids)
            if journal is not None:
                _write(journal, finished[-1], dumps, gflops if len(finished) == 1 else {})
    return finished, gflops


def _count_padded(model: nn.Module, inputs: list[dict[str, Any]]) -> int:
    """How many of a batch's images are padded further than they are alone."""
    if len(inputs) == 1 or square_side(model):
        return 0
    backbone = getattr(model, "backbone", None)
    # What a model pads to by itself comes before its backbone's, as in Mask2Former.
    multiple = getattr(model, "size_divisibility", 0) or (size_divisibility(backbone) if backbone is not None else 0)
    sizes = [
        tuple(math.ceil(side / max(1, multiple)) for side in record["image"].shape[-2:])
        for record in inputs
        if "image" in record
    ]
    largest = tuple(map(max, zip(*sizes)))
    return sum(size != largest for size in sizes)


def _describe_padding(batches: list[_Batch]) -> list[str]:
    padded = sum(batch.padded for batch in batches)
    if not padded:
        return []
    total = sum(len(batch.image_ids) for batch in batches)
    return [
        f"{padded} of {total} images were padded to the size of a larger one in their batch, what is found in them may "
        "differ from evaluation.batch_size=1"
    ]


def _annotated_images(evaluator: DatasetEvaluator) -> set[Any] | None:
    """The images that all evaluators with annotations in COCO's format have; None where there is no such evaluator."""
    sets = [set(member._coco_api.imgs) for member in members(evaluator) if hasattr(member, "_coco_api")]
    return set.intersection(*sets) if sets else None


def _check_images(inputs: list[dict[str, Any]], annotated: set[Any] | None, done: Collection[Any]) -> list[Any]:
    """The ids of a batch's images."""
    image_ids: list[Any] = []
    for record in inputs:
        if "image_id" not in record:
            raise InputError(f"an image to be compared must have an 'image_id', got {sorted(record)}")
        image_id = record["image_id"]
        if image_id in done or image_id in image_ids:
            raise InputError(f"an image must be compared once, got {image_id!r} again: ids of images must be unique")
        if annotated is not None and image_id not in annotated:
            raise InputError(f"image {image_id!r} is not among the {len(annotated)} images that the evaluator has")
        image_ids.append(image_id)
    return image_ids


def _write(journal: Journal, batch: _Batch, dumps: dict[str, list[list[Any]]], gflops: dict[str, float]) -> None:
    """One record, so that an interruption leaves batches whole; ``dumps``: name -> image -> evaluator -> its own."""
    models = {
        name: {"run": finished.run, "peak_memory_mb": finished.peak_memory_mb, "evaluators": dumps[name]}
        for name, finished in batch.models.items()
    }
    journal.append({"image_ids": batch.image_ids, "models": models, "gflops": gflops, "padded": batch.padded})


def _read(journal: Journal, subjects: dict[str, Subject]) -> tuple[list[_Batch], dict[str, float]]:
    """What :func:`_write` wrote, restored to the evaluators."""
    finished, gflops = [], {}
    for record in journal.records():
        gflops.update(record["gflops"])
        models = {
            name: _Finished(Run(*model["run"]), model["peak_memory_mb"]) for name, model in record["models"].items()
        }
        finished.append(_Batch(record["image_ids"], models, record["padded"]))
        for name, subject in subjects.items():
            for image_id, image in zip(record["image_ids"], record["models"][name]["evaluators"]):
                for member, kept in zip(members(subject.evaluator), image):
                    restore(member, image_id, kept)
    return finished, gflops


def _resample(
    evaluator: DatasetEvaluator, accuracy: dict[str, dict[str, float]]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """The samples and the classes of a :class:`Measurement`."""
    samples, classes = {}, {}
    for member in members(evaluator):
        # In all but the main process an evaluator has nothing to draw from.
        images = len(getattr(member, "image_ids", ()))
        if images and hasattr(member, "resample_classes"):
            weights = draw_samples(images)
            figures = member.resample_classes(weights)
            classes.update(figures)
            samples.update({key: mean_of_classes(values.values(), len(weights)) for key, values in figures.items()})
        elif images and hasattr(member, "resample"):
            samples.update(member.resample(draw_samples(images)))
    for task, metrics in accuracy.items():
        for figure in reported(task, metrics):
            values = by_class(figure, metrics) if figure.main and figure.key not in classes else {}
            if values:
                classes[figure.key] = {name: np.array([value]) for name, value in values.items()}
    return samples, classes


def _agreement(subjects: dict[str, Subject], image_ids: list) -> dict[str, dict[str, np.ndarray]]:
    recorders = {
        name: recorder
        for name, subject in subjects.items()
        for recorder in members(subject.evaluator)
        if isinstance(recorder, OutputRecorder) and recorder.compared
    }
    first, *others = subjects
    if first not in recorders:
        return {}
    # In the order of the other evaluators, so that samples are of the same images.
    orders = (list(getattr(member, "image_ids", ())) for member in members(subjects[first].evaluator))
    ids = next((order for order in orders if order), image_ids)
    weights = draw_samples(len(ids))
    return {name: agreement(recorders[first], recorders[name], ids, weights) for name in others if name in recorders}


def _required_images(evaluator: DatasetEvaluator) -> set[Any] | None:
    """The images that an evaluator takes whichever ran; None where it takes those that ran."""
    if isinstance(evaluator, LVISEvaluator):
        return set(evaluator._lvis_api.imgs)
    if isinstance(evaluator, RotatedCOCOEvaluator):
        return set(evaluator._coco_api.imgs)
    if isinstance(evaluator, PascalVOCDetectionEvaluator):
        return set(Path(evaluator._image_set_path).read_text().split())
    return None


def _evaluate(evaluator: DatasetEvaluator, image_ids: list) -> dict[str, dict[str, Any]]:
    if isinstance(evaluator, DatasetEvaluators):  # its own evaluate() takes no img_ids
        results = {}
        for member in members(evaluator):
            for task, metrics in _evaluate(member, image_ids).items():
                if task in results:
                    raise InputError(f"evaluators must evaluate different tasks, got two that evaluate {task!r}")
                results[task] = metrics
        return results
    annotated = _required_images(evaluator)
    if annotated is not None and annotated != set(image_ids):
        raise InputError(
            f"{type(evaluator).__name__} evaluates all {len(annotated)} images of its annotations, got {len(image_ids)}"
            ": run the whole data set (evaluation.max_images=null)"
        )
    takes_ids = "img_ids" in inspect.signature(evaluator.evaluate).parameters
    arguments = {"img_ids": image_ids} if takes_ids else {}
    # COCO's evaluation prints tables of its own, and Detectron2's logs them.
    logger = logging.getLogger("detectron2.evaluation")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return evaluator.evaluate(**arguments) or {}
    finally:
        logger.setLevel(level)
