"""Warnings for readers of the figures: limits that cut them, and outputs that are not finite."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from hourglass.evaluation.figures import reported, split_key
from hourglass.evaluation.instances import Crowding

# What models call the most detections that they give of an image: Fast R-CNN's heads, Mask2Former, RetinaNet.
LIMITS = ("test_topk_per_image", "detections_per_image", "max_detections_per_image")


def find_faults(
    model: nn.Module,
    evaluators: Sequence[DatasetEvaluator],
    finite: np.ndarray,
    in_list: bool = True,
    batch_size: int = 1,
) -> list[str]:
    """
    Warnings about an evaluation that has run.

    Args:
        model: what was evaluated.
        evaluators: of its outputs, after evaluation in the main process.
        finite: (batches,) whether the output of the model's encoder was.
        in_list: whether the config has the evaluators in a list, for the overrides that are named.
        batch_size: of the batches.

    Returns:
        a line for each fault.
    """
    lines = []
    broken = int(np.sum(np.asarray(finite) == 0))
    if broken:
        units = "images" if batch_size == 1 else "batches"
        lines.append(f"the encoder's output is not finite in {broken} of {len(finite)} {units}")
    for i, evaluator in enumerate(evaluators):
        option = f"dataloader.evaluator.{i}" if in_list else "dataloader.evaluator"
        if not getattr(evaluator, "_do_evaluation", True):  # COCO's test sets have none
            lines.append(f"no figure from {type(evaluator).__name__}: the data set has no annotations")
        elif getattr(evaluator, "crowding", None) is not None:
            lines += describe_limits(evaluator.crowding, evaluator.max_detections, option, model)
        lines += getattr(evaluator, "warnings", [])
    return lines


def describe_corrections(corrected: np.ndarray, batch_size: int = 1) -> list[str]:
    """
    Args:
        corrected: (batches,) share of a calibrated plan's correction that they got.
        batch_size: of the batches.

    Returns:
        a line, if some got less than all.
    """
    held_back = corrected < 1
    if not held_back.any():
        return []
    units = "images" if batch_size == 1 else "batches"
    return [
        f"the calibration is held back in {held_back.sum()} of {len(corrected)} {units}, unlike those that it was "
        f"fitted to ({100 * corrected[held_back].mean():.0f} % of the correction is applied there): calibrate on "
        "images like these"
    ]


def describe_gaps(accuracy: dict[str, dict[str, float]], classes: dict[str, dict[str, Any]]) -> list[str]:
    """
    Args:
        accuracy: task -> metric -> figure.
        classes: those of the tasks whose evaluators are known to have a figure wherever there is something to find.

    Returns:
        a line that says why figures that are reported are nan, if any.
    """
    tasks = {split_key(key)[0] for key, samples in classes.items() if samples}
    gaps: dict[bool, list[str]] = {True: [], False: []}
    for task, metrics in accuracy.items():
        for figure in reported(task, metrics):
            if math.isnan(metrics[figure.metric]):
                gaps[task in tasks].append(figure.label or figure.metric)
    reasons = {True: "there is nothing of the kind to find", False: "the evaluator gives none"}
    return [f"no figure of {', '.join(labels)}: {reasons[is_known]}" for is_known, labels in gaps.items() if labels]


def describe_weights(model: nn.Module) -> list[str]:
    """A line that names the weights that are not finite, if any."""
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if not broken:
        return []
    return [f"{len(broken)} of the model's weights are not finite, such as {broken[0]}"]


def describe_limits(crowding: Crowding, max_detections: int, option: str, model: nn.Module) -> list[str]:
    """
    Say which images have more than is evaluated, and what raises the limit.

    Args:
        crowding: what there is in the images.
        max_detections: how many of an image's detections of a category COCO's evaluation takes.
        option: the key of the evaluator in a config.
        model: whose own limit of detections is looked at.

    Returns:
        at most a line for each limit.
    """
    lines, images = [], len(crowding.objects)
    for name, counts in (("objects", crowding.objects_of_one), ("detections", crowding.detections_of_one)):
        over = int((counts > max_detections).sum())
        if over:
            override = f"{option}.max_dets_per_image={_round_up(counts.max())}"
            lines.append(
                f"{over} of {images} images have more {name} of a class than the {max_detections} detections that are "
                f"evaluated (up to {counts.max()}): {override} raises the limit"
            )
    key, most = detection_limit(model)
    if most is not None:
        cut = (crowding.detections >= most) & (crowding.objects > crowding.detections)
        if cut.any():
            objects = crowding.objects[cut].max()
            lines.append(
                f"{cut.sum()} of {images} images have more objects than the {most} detections that the model gives at "
                f"most (up to {objects}): {key}={_round_up(objects)} raises the limit"
            )
    return lines


def detection_limit(model: nn.Module) -> tuple[str, int | None]:
    """The key in a config of the most detections that a model gives of an image, and how many; None without one."""
    limit: tuple[str, int | None] = ("", None)
    for name, module in model.named_modules():
        for attribute in LIMITS:
            most = getattr(module, attribute, None)
            if isinstance(most, int) and most >= 0:
                # A cascade's heads are called otherwise in configs; its last one gives the detections.
                path = name.replace("box_predictor.", "box_predictors.")
                limit = (".".join(part for part in ("model", path, attribute) if part), most)
    return limit


def _round_up(count: int) -> int:
    return 100 * math.ceil(count / 100)
