"""Training a model from a LazyConfig with Detectron2's trainer and hooks."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hourglass.checks import check_choice, check_number
from hourglass.data.opening import open_train
from hourglass.errors import InputError, reason
from hourglass.files import save_whole
from hourglass.reduction import Reducer, collect_losses

#: What is trained: all of the model, or of it only a reducer that learns.
TRAINABLE = ("all", "reducer")


class Trainer(SimpleTrainer):
    """
    Detectron2's ``SimpleTrainer`` with bfloat16 autocast on any device (its ``AMPTrainer`` is for CUDA) and a limit
    on the gradient's norm.

    Args:
        model, data_loader, optimizer: as for ``SimpleTrainer``.
        device: "cuda" or "cpu".
        amp: run the forward pass in bfloat16 where autocast allows it; needs no loss scaling.
        clip_gradient: largest L2 norm of the gradient of all parameters; None: no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        device: str,
        amp: bool,
        clip_gradient: float | None,
    ):
        super().__init__(model, data_loader, optimizer)
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=amp)
        self._clip_gradient = clip_gradient

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with self._autocast, collect_losses() as collected:
            losses = self.model(data)
        losses.update(collected.losses)
        self.storage.put_scalars(**collected.figures)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        if self._clip_gradient is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_gradient)
        self._write_metrics(losses, data_time)
        self.optimizer.step()


def check_training(cfg: DictConfig) -> None:
    """
    Raises:
        InputError: for a config that lacks what only training reads, or with an optimizer's number that is none.
    """
    for key, example in (
        ("optimizer", "configs/common/optimizer.py has one"),
        ("optimizer.params", "the call of a function that takes the model, see configs/common/optimizer.py"),
        ("lr_multiplier", "configs/demo/vitdet.py has one"),
        ("dataloader.train", "configs/common/coco.py has one"),
    ):
        if OmegaConf.select(cfg, key) is None:
            raise InputError(f"a config that is trained must have {key!r} ({example}); --eval-only needs none")
    if "lr" in cfg.optimizer:
        check_number("optimizer.lr", cfg.optimizer.lr, 0)
    check_choice("train.trainable", cfg.train.trainable, TRAINABLE)
    if cfg.train.expedite and cfg.get("plan", {}).get("calibration") is not None:
        raise InputError(
            "plan.calibration must be null in training, which changes the weights that it is for: calibrate afterwards"
        )


def train(cfg: DictConfig, model: nn.Module, evaluate: Callable[[], dict], resume: bool = False) -> None:
    """
    Train ``model`` as ``cfg.train`` says and write checkpoints, ``metrics.json`` and the log to its ``output_dir``, and
    the weights of a reducer that learns alone to ``reducer.pth``.

    Args:
        cfg: with ``dataloader.train``, ``optimizer``, ``lr_multiplier`` and ``train``.
        model: on its device, its initial weights loaded.
        evaluate: called every ``train.eval_period`` iterations and at the end; returns figures to log, flat.
        resume: continue from the last checkpoint in ``output_dir``.

    Raises:
        InputError: for training data that is missing or cannot be read, and where nothing is to be trained.
    """
    options = cfg.train
    loader = open_train(cfg, model)
    reducer = _learned_reducer(model)
    if options.trainable == "reducer":
        if reducer is None:
            raise InputError(
                'train.trainable="reducer" needs a reducer with parameters, such as TokenSelection, as plan.reducer, '
                "and train.expedite=true; got none"
            )
        model.requires_grad_(False)
        reducer.requires_grad_(True)
    cfg.optimizer.params.model = model
    optimizer, schedule = _instantiate(cfg, "optimizer"), _instantiate(cfg, "lr_multiplier")
    cfg.optimizer.params.pop("model")  # the config is written as it was
    main = comm.is_main_process()
    os.makedirs(options.output_dir, exist_ok=True)
    setup_logger(options.output_dir, distributed_rank=comm.get_rank())
    # The trainer logs what ends the training with its traceback; what a user got wrong has a line of its own.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_input_error)
    if main:
        LazyConfig.save(cfg, os.path.join(options.output_dir, "config.yaml"))
    replica = model
    if comm.get_world_size() > 1:
        device_ids = [comm.get_local_rank()] if options.device == "cuda" else None
        replica = DistributedDataParallel(model, device_ids=device_ids, **options.ddp)
    trainer = Trainer(replica, loader, optimizer, options.device, options.amp.enabled, options.clip_gradient)
    checkpointer = DetectionCheckpointer(model, options.output_dir, trainer=trainer)
    writers = []
    if main:
        writers = [
            CommonMetricPrinter(options.max_iter),
            JSONWriter(os.path.join(options.output_dir, "metrics.json")),
        ]

    def save_reducer(finished: TrainerBase) -> None:  # before the evaluation, which may take hours
        if reducer is not None and finished.iter + 1 >= options.max_iter:
            save_whole(Path(options.output_dir, "reducer.pth"), reducer.state_dict())

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=schedule),
            hooks.PeriodicCheckpointer(checkpointer, **options.checkpointer) if main else None,
            hooks.CallbackHook(after_train=save_reducer) if main else None,
            hooks.EvalHook(options.eval_period, evaluate),
            hooks.PeriodicWriter(writers, period=options.log_period) if main else None,
        ]
    )
    start = 0
    if resume and checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
    elif resume and main:
        logging.getLogger(__name__).warning(
            "nothing to resume, starting anew: %s has no last_checkpoint", options.output_dir
        )
    trainer.train(start, options.max_iter)


def _instantiate(cfg: DictConfig, key: str) -> Any:
    try:
        return instantiate(cfg[key])
    except (ImportError, TypeError, ValueError) as error:  # an argument that it does not take
        raise InputError(f"{key} cannot be built ({reason(error)})") from error


def _learned_reducer(model: nn.Module) -> Reducer | None:
    """The model's reducer, if it has parameters."""
    reducers = (module for module in model.modules() if isinstance(module, Reducer))
    return next((reducer for reducer in reducers if any(True for _ in reducer.parameters())), None)


def _is_no_input_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], InputError))
