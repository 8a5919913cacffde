"""Shared by commands: loading a config, building its parts, and one-line errors."""

import contextlib
import copy
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf

from hourglass.checks import check_count, check_number, check_switch, check_text
from hourglass.errors import InputError
from hourglass.files import check_folder
from hourglass.overrides import apply_overrides

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "demo" / "vitdet.py"
# The least that options of training may be.
TRAINING_COUNTS = {"max_iter": 1, "eval_period": 0, "log_period": 1, "checkpointer.period": 1}
# What of a plan may differ from that which its calibration was fitted to.
FREE = ("plan.calibration", "plan.attention")
# What is raised on a full disk and in a folder without permission.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def load_config(path: str, overrides: list[str]) -> DictConfig:
    if not os.path.isfile(path):
        raise InputError(f"config file {path} is missing")
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # a config is a program
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"config file {path} cannot be loaded ({type(error).__name__}: {reason})") from error
    for key in ("model", "dataloader", "plan"):
        if not isinstance(cfg.get(key), DictConfig):
            raise InputError(f"config file {path} has no {key!r}: configs/demo/vitdet.py is an example")
    common = LazyConfig.load(str(CONFIGS / "common" / "train.py"))
    for key in ("train", "evaluation", "search"):
        cfg[key] = OmegaConf.merge(common[key], cfg.get(key, {}))
    cfg.dataloader.setdefault("image_scaling", "full")
    apply_overrides(cfg, overrides)
    names = [override.partition("=")[0] for override in overrides]
    changed = [name for name in names if name.startswith("plan.") and name not in FREE]
    if "plan.calibration" not in names and (changed or "train.init_checkpoint" in names):
        reason = f"{changed[0]} makes another plan" if changed else "train.init_checkpoint may have other weights"
        leave_out_calibration(cfg, reason)
    check_options(cfg.train, cfg.evaluation, cfg.search)
    return cfg


def leave_out_calibration(cfg: DictConfig, reason: str) -> None:
    """Take the calibration out of a config's plan, with a warning, where it has one."""
    if isinstance(cfg.plan, DictConfig) and cfg.plan.get("calibration") is not None:
        cfg.plan.calibration = None
        warn(f"the config's plan.calibration is left out: {reason}, and --calibrate fits another")


def warn(line: str) -> None:
    """Print a warning to stderr, in the main process."""
    if comm.is_main_process():
        print(f"warning: {line}", file=sys.stderr, flush=True)


def find_device(name: Any) -> str:
    """ "cuda" or "cpu" for ``train.device``; InputError for other values, and where there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise InputError(f'train.device must be "cuda", "cpu" or "auto", got {name!r}')
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError('train.device is "cuda", but torch finds no CUDA device: use "cpu" or "auto"')
    return name


def check_options(train: DictConfig, evaluation: DictConfig, search: DictConfig) -> None:
    """Raise InputError for an option of a wrong type or out of range; put the device in the place of "auto"."""
    train.device = find_device(train.device)
    if evaluation.dtype not in ("float32", "bfloat16"):
        raise InputError(f'evaluation.dtype must be "float32" or "bfloat16", got {evaluation.dtype!r}')
    for key in ("output_dir", "init_checkpoint"):
        check_text(f"train.{key}", train[key])
        train[key] = os.path.expanduser(train[key])
    check_folder("train.output_dir", train.output_dir)
    check_count("evaluation.warmup", evaluation.warmup, 0)
    check_count("evaluation.batch_size", evaluation.batch_size, 1)
    if evaluation.max_images is not None:
        check_count("evaluation.max_images", evaluation.max_images, 1)
    score = evaluation.report.score
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise InputError(f"evaluation.report.score must be a number from 0 to 1, got {score!r}")
    check_count("evaluation.report.images", evaluation.report.images, 0)
    if search.images is not None:
        check_count("search.images", search.images, 2)
    if search.dataset is not None:
        check_text("search.dataset", search.dataset)
    for key, smallest in TRAINING_COUNTS.items():
        check_count(f"train.{key}", OmegaConf.select(train, key), smallest)
    for key in ("allow_partial_checkpoint", "expedite", "amp.enabled"):
        check_switch(f"train.{key}", OmegaConf.select(train, key))
    if train.seed is not None:
        check_count("train.seed", train.seed, 0)
    if train.clip_gradient is not None:
        check_number("train.clip_gradient", train.clip_gradient, 0)


def build(cfg: DictConfig, key: str) -> Any:
    try:
        return instantiate(cfg[key])
    except (TypeError, ImportError) as error:  # an argument that a constructor does not take, a class that is not there
        raise InputError(f"{key} cannot be built: {str(error).splitlines()[0]}") from error


def build_evaluator(cfg: DictConfig, model: str | None = None) -> DatasetEvaluator:
    """
    Args:
        cfg: with ``dataloader.evaluator``, a call or a list of them.
        model: name of the model that it evaluates; an evaluator's ``output_dir`` gets a folder for it.

    Raises:
        InputError: for data that the evaluator cannot evaluate.
    """
    node = copy.deepcopy(cfg.dataloader)
    calls = node.evaluator if isinstance(node.evaluator, ListConfig) else [node.evaluator]
    for call in calls:
        if model is not None and call.get("output_dir"):
            call.output_dir = os.path.join(call.output_dir, re.sub(r"\W+", "_", model).strip("_"))
    try:
        evaluator = instantiate(node.evaluator)
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError) as error:  # data that it cannot evaluate
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        name = cfg.dataloader.test.dataset.get("names")
        raise InputError(f"dataloader.evaluator cannot be built for data set {name!r} ({reason})") from error
    # A config may have a list of them.
    return evaluator if isinstance(evaluator, DatasetEvaluator) else DatasetEvaluators(list(evaluator))


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """
    A context in which an InputError, a file that cannot be written and an interruption end the command with one line on
    stderr, and exit code 2, or 130 for an interruption.
    """
    try:
        yield
    except InputError as error:
        message = str(error).strip()
        if message.startswith("Caught InputError in DataLoader worker"):  # with the worker's traceback
            message = message.splitlines()[-1].removeprefix("hourglass.errors.InputError: ")
        exit_with_error(message)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        exit_with_error(": ".join(filter(None, (error.filename, error.strerror))))
    except KeyboardInterrupt as interruption:
        if comm.is_main_process():
            print(f"\ninterrupted: {interruption}".removesuffix(": "), file=sys.stderr, flush=True)
        sys.exit(130)


def exit_with_error(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
