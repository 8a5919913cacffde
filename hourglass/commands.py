"""What ``train_net.py`` does beside training: comparing a model with itself on fewer tokens, and calibrating a plan."""

import os
import sys
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from hourglass.data.opening import load_test, open_search, open_test, search_dataset
from hourglass.encoders import Plan, expedite, find_encoder
from hourglass.encoders.calibration import Calibration
from hourglass.errors import InputError
from hourglass.evaluation import Subject, compare, to_json, to_text, write_report
from hourglass.evaluation.journal import open_journal
from hourglass.fitting import calibrate
from hourglass.launch import build_evaluator


class Options(NamedTuple):
    """
    Of a comparison.

    Attributes:
        control: also without the plan's blocks, and with an affine map in their place.
        only: the one model to run; None: all.
        by_class: also tables by class.
        resume: go on from the images that the output folder has.
        journal: whether finished images are kept there.
    """

    control: bool = False
    only: str | None = None
    by_class: bool = False
    resume: bool = False
    journal: bool = False


def run_comparison(cfg: DictConfig, model: nn.Module, plan: Plan, options: Options) -> dict[str, Any]:
    """Compare and report; returns the content of ``comparison.json``, empty in all but the main process."""
    plans = {"unmodified": Plan(), "fast attention": Plan(attention="fast"), "expedited": plan}
    if not plan.fast or plan.reducer is None and plan.keys == 1:
        del plans["fast attention"]
    records = open_test(cfg, model, cfg.evaluation.max_images)
    if options.control:
        plans |= controls(cfg, model, plan)
    if options.only:
        plans = {options.only: plans[options.only]}
    subjects = {}
    for name, its_plan in plans.items():
        view = expedite(model, its_plan)
        subjects[name] = Subject(view, find_encoder(view)[1], build_evaluator(cfg, name))
    journal = open_journal(cfg, subjects, plans, records, options.resume) if options.journal else None
    remaining = records if journal is None else [each for each in records if each["image_id"] not in journal.done]
    comparison = compare(
        subjects,
        load_test(cfg, model, remaining),
        device=cfg.train.device,
        dtype=getattr(torch, cfg.evaluation.dtype),
        warmup=cfg.evaluation.warmup,
        journal=journal,
    )
    if comparison is None:
        return {}
    document = to_json(
        comparison,
        dataset=str(cfg.dataloader.test.dataset.names),
        device=cfg.train.device,
        dtype=cfg.evaluation.dtype,
        plan=plan.describe(),
    )
    print(f"\n{to_text(document, by_class=options.by_class)}\n")
    for line in document["warnings"]:
        warn(line)
    write_report(document, cfg.train.output_dir, options.by_class)
    print(f"written to {os.path.join(cfg.train.output_dir, 'comparison.json')}, .csv and .md", flush=True)
    if journal is not None:
        journal.remove()
    return document


def controls(cfg: DictConfig, model: nn.Module, plan: Plan) -> dict[str, Plan]:
    """
    The plan's blocks left out, and an affine map in their place, which is fitted to images of ``cfg.search``; without
    those images, with a warning, the first alone.
    """
    if plan.reducer is None:
        return {"control": plan.control()}
    found = {"control": plan.control()}
    linear = plan.linear_control()
    try:
        images = open_search(cfg, model)
    except InputError as error:
        warn(f"no linear control, whose affine map is fitted to search.images of search.dataset: {error}")
        return found
    return {**found, "linear control": linear.calibrated(calibrate(model, linear, images, search_dataset(cfg)))}


def run_calibration(cfg: DictConfig, model: nn.Module, plan: Plan) -> str:
    """Calibrate the plan on images of ``cfg.search``; returns the path of the file that is written."""
    calibration = calibrate(model, plan, open_search(cfg, model), search_dataset(cfg))
    path = os.path.join(cfg.train.output_dir, "calibration.pth")
    if comm.is_main_process():
        os.makedirs(cfg.train.output_dir, exist_ok=True)
        calibration.save(path)
        print(f"\n{describe_fit(calibration)}\nwritten to {path}: plan.calibration={path} takes it", flush=True)
    return path


def describe_fit(calibration: Calibration) -> str:
    """What a calibration was fitted to, and the error that it leaves, in a line a stage."""
    seen = calibration.seen
    lines = [f"{seen['images']} images of {seen['about']}; squared error of the blocks' output, in % of its variance:"]
    for i, stage in enumerate(seen["stages"]):
        which = f"stage {i + 1} of the plan: " if len(seen["stages"]) > 1 else ""
        before, left = (f"{100 * stage[key]:.2f} %" for key in ("left without", "left"))
        how = f"form {stage['form']}, ridge {stage['ridge']:g}, rank {stage['rank']}"
        lines.append(f"  {which}{before} without, {left} with it, on images that were left out ({how})")
    return "\n".join(lines)


def warn(line: str) -> None:
    if comm.is_main_process():
        print(f"warning: {line}", file=sys.stderr, flush=True)
