"""Comparing models of the same weights on one data set: accuracy, latency and cost, image by image in turn."""

import contextlib
import inspect
import io
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from hourglass.errors import InputError
from hourglass.evaluation.cost import PeakMemory, count_gflops
from hourglass.evaluation.resampling import Interval, draw_samples, ratio_of_medians, ratio_of_samples
from hourglass.evaluation.timing import Clock, Run, Stopwatch

# The figure that a task's retention is of; AP for the tasks that are not here.
MAIN_METRICS = {"panoptic_seg": "PQ", "sem_seg": "mIoU"}


class Subject(NamedTuple):
    """
    A model to be compared.

    Attributes:
        model: takes and returns Detectron2's dictionaries.
        encoder: the part of it that is timed and counted.
        evaluator: of its outputs; several of them as Detectron2's `DatasetEvaluators`.
    """

    model: nn.Module
    encoder: nn.Module
    evaluator: DatasetEvaluator


class Measurement(NamedTuple):
    """
    What was measured of one model.

    Attributes:
        accuracy: task -> metric -> figure, from the evaluator; nan where there is none.
        samples: "task.metric" -> (samples,), the figure on samples of the images, the same ones for each model; the
            first sample is the images themselves. Of evaluators that can be resampled.
        runs: part of a :class:`Run` -> (images,).
        encoder_gflops: of the first image.
        peak_memory_mb: over all images.
    """

    accuracy: dict[str, dict[str, float]]
    samples: dict[str, np.ndarray]
    runs: dict[str, np.ndarray]
    encoder_gflops: float
    peak_memory_mb: float


class Comparison(NamedTuple):
    """
    Measurements of models on the same images. The first model is what the others are compared with.

    Attributes:
        models: name -> measurement.
        max_detections: how many of an image COCO's evaluation takes; None where there is none.
    """

    models: dict[str, Measurement]
    max_detections: int | None = None

    def speedup(self, name: str, part: str) -> Interval:
        """How many times faster than the first model ``name`` runs ``part``, "encoder" or "total"."""
        first = next(iter(self.models.values()))
        return ratio_of_medians(first.runs[part], self.models[name].runs[part])

    def retention(self, name: str) -> dict[str, Interval]:
        """
        Share of the first model's AP, PQ or mIoU that ``name`` keeps: "bbox.AP" -> share, nan where there is no figure,
        with a paired bootstrap interval over images, nan where the evaluator cannot be resampled or where there is one
        image.
        """
        first, kept = next(iter(self.models.values())), self.models[name]
        shares = {}
        for task, metrics in first.accuracy.items():
            main = MAIN_METRICS.get(task, "AP")
            key = f"{task}.{main}"
            if key in first.samples and key in kept.samples:
                shares[key] = ratio_of_samples(first.samples[key], kept.samples[key])
            elif main in metrics:
                figure = kept.accuracy.get(task, {}).get(main, np.nan)
                shares[key] = Interval(figure / metrics[main] if metrics[main] > 0 else np.nan, np.nan, np.nan)
        return shares

    def efficiency(self, name: str) -> float:
        """Share of the encoder's time that is not reducing and restoring: 1 is the limit for its number of tokens."""
        runs = self.models[name].runs
        return float(np.median(runs["encoder"] - runs["reduction"]) / np.median(runs["encoder"]))


def compare(
    subjects: dict[str, Subject],
    images: Iterable[list[dict]],
    image_ids: list | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    warmup: int = 3,
    what: str | None = None,
) -> Comparison | None:
    """
    Run every model on every image, in turn and in alternating order, evaluate the outputs and time the runs.

    Every process of a distributed job calls this with its share of the images.

    Args:
        subjects: name -> model, the one to be compared with first.
        images: Detectron2's input dictionaries, one image at a time; has a length.
        image_ids: evaluate only these images of the data set; None: all.
        device: "cuda" or "cpu".
        dtype: float32, or another type for autocast.
        warmup: untimed runs of each model on the first image.
        what: text before the progress bar; None: the names of the models.

    Returns:
        the comparison; None in all but the main process.

    Raises:
        InputError: for batches of several images.
    """
    clock, memory = Clock(device), PeakMemory(device)
    runs: dict[str, list[Run]] = {name: [] for name in subjects}
    peaks = dict.fromkeys(subjects, 0.0)
    encoder_inputs: dict[str, tuple] = {}
    names = list(subjects)
    what = what or f"comparing {' and '.join(names)}"
    for subject in subjects.values():
        subject.evaluator.reset()
    with contextlib.ExitStack() as stack:
        for subject in subjects.values():
            stack.enter_context(_evaluating(subject.model))
        with contextlib.ExitStack() as timed, torch.no_grad():
            timed.enter_context(torch.autocast(device, dtype, enabled=dtype != torch.float32))
            watches = {name: Stopwatch(subject.model, subject.encoder, clock) for name, subject in subjects.items()}
            for watch in watches.values():
                timed.callback(watch.close)
            for i, inputs in enumerate(tqdm(images, desc=what, unit="image", disable=not comm.is_main_process())):
                if len(inputs) != 1:
                    raise InputError(f"models are compared on one image at a time, got a batch of {len(inputs)}")
                if i == 0:
                    for name in names * warmup:
                        watches[name].run(inputs)
                for name in names if i % 2 == 0 else reversed(names):
                    memory.reset()
                    outputs, run = watches[name].run(inputs)
                    peaks[name] = max(peaks[name], memory.read())
                    runs[name].append(run)
                    encoder_inputs.setdefault(name, watches[name].encoder_input)
                    subjects[name].evaluator.process(inputs, outputs)
        gflops = {name: count_gflops(subjects[name].encoder, inputs) for name, inputs in encoder_inputs.items()}

    accuracy = {name: _evaluate(subject.evaluator, image_ids) for name, subject in subjects.items()}
    samples = {name: _resample(subject.evaluator) for name, subject in subjects.items()}
    shares = comm.gather((runs, peaks, gflops))
    if not comm.is_main_process():
        return None
    measurements = {}
    for name in names:
        every = [run for runs, _, _ in shares for run in runs[name]]
        measurements[name] = Measurement(
            accuracy=accuracy[name],
            samples=samples[name],
            runs={part: np.array([getattr(run, part) for run in every]) for part in Run._fields},
            encoder_gflops=next(gflops[name] for _, _, gflops in shares if name in gflops),
            peak_memory_mb=max(peaks[name] for _, peaks, _ in shares),
        )
    limits = [getattr(member, "max_detections", None) for member in members(subjects[names[0]].evaluator)]
    return Comparison(measurements, next((limit for limit in limits if limit is not None), None))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def members(evaluator: DatasetEvaluator) -> list[DatasetEvaluator]:
    """The evaluators that one of them may consist of."""
    return evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]


def _resample(evaluator: DatasetEvaluator) -> dict[str, np.ndarray]:
    figures = {}
    for member in members(evaluator):
        # In all but the main process an evaluator has nothing to draw from.
        if hasattr(member, "resample") and len(member.image_ids):
            figures.update(member.resample(draw_samples(len(member.image_ids))))
    return figures


def _evaluate(evaluator: DatasetEvaluator, image_ids: list | None) -> dict[str, dict[str, Any]]:
    if isinstance(evaluator, DatasetEvaluators):  # its own evaluate() takes no img_ids
        results = {}
        for member in members(evaluator):
            for task, metrics in _evaluate(member, image_ids).items():
                if task in results:
                    raise InputError(f"an evaluator for each task is taken, got two that evaluate {task!r}")
                results[task] = metrics
        return results
    arguments = {}
    if image_ids is not None and "img_ids" in inspect.signature(evaluator.evaluate).parameters:
        arguments["img_ids"] = image_ids
    # COCO's evaluation prints tables of its own, and Detectron2's logs them.
    logger = logging.getLogger("detectron2.evaluation")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return evaluator.evaluate(**arguments) or {}
    finally:
        logger.setLevel(level)
