#!/usr/bin/env python
"""
Compare a model with itself on fewer tokens, or train it.

    python train_net.py --eval-only                                   the embedded demo
    python train_net.py --eval-only --config-file configs/vitdet/mask_rcnn_b.py plan.start=4
    python train_net.py --config-file configs/demo/vitdet.py train.output_dir=output/demo
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import hourglass  # first: it mends Detectron2 0.6

# isort: split
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from torch.multiprocessing import ProcessExitedException

from hourglass import InputError, Plan
from hourglass.checkpoint import load_checkpoint
from hourglass.compat import init_process_group
from hourglass.data.loading import build_loader
from hourglass.encoders import find_encoder
from hourglass.evaluation import Subject, compare, describe, to_json, to_table, write_report
from hourglass.overrides import apply_overrides
from hourglass.training import train

DEMO = Path(__file__).parent / "configs" / "demo" / "vitdet.py"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(DEMO), help="a LazyConfig; without one, the demo's")
    parser.add_argument("--eval-only", action="store_true", help="compare the models, do not train")
    parser.add_argument("--control", action="store_true", help="a third model: the plan's blocks left out")
    parser.add_argument("--only", choices=("unmodified", "expedited"), help="run one of the models")
    parser.add_argument("--resume", action="store_true", help="train on from the last checkpoint in train.output_dir")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes, one a GPU, on this machine")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the config, such as plan.start=4 'plan.reducer.grid=[20,20]' evaluation.max_images=50",
    )
    return parser.parse_intermixed_args(arguments)


def load_config(path: str, overrides: list[str]) -> DictConfig:
    if not os.path.isfile(path):
        raise InputError(f"config file {path} is missing")
    try:
        cfg = LazyConfig.load(path)
    except InputError:
        raise
    except Exception as error:  # a config is a program
        raise InputError(f"config file {path} cannot be loaded ({type(error).__name__}: {error})") from error
    apply_overrides(cfg, overrides)
    for key in ("model", "dataloader", "train", "plan", "evaluation"):
        if key not in cfg:
            raise InputError(f"config file {path} has no {key!r}: import it from configs/common, as configs/demo does")
    if cfg.train.device == "auto":
        cfg.train.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.train.device not in ("cuda", "cpu"):
        raise InputError(f'train.device takes "cuda", "cpu" or "auto", got {cfg.train.device!r}')
    if cfg.train.device == "cuda" and not torch.cuda.is_available():
        raise InputError('train.device is "cuda", but torch finds no CUDA device: take "cpu" or "auto"')
    limit = cfg.evaluation.max_images
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"evaluation.max_images takes a whole number of at least 1, or null, got {limit!r}")
    if cfg.evaluation.dtype not in ("float32", "bfloat16"):
        raise InputError(f'evaluation.dtype takes "float32" or "bfloat16", got {cfg.evaluation.dtype!r}')
    return cfg


def build_plan(node: DictConfig) -> Plan:
    try:
        return instantiate(node)
    except TypeError as error:  # an argument that the reducer does not take
        raise InputError(f"plan cannot be built: {error}") from error


def run_comparison(cfg: DictConfig, model: torch.nn.Module, plan: Plan, args: argparse.Namespace) -> dict:
    """Compare and report; returns the content of ``comparison.json``, empty in all but the main process."""
    plans = {"unmodified": Plan(), "expedited": plan}
    if args.control:
        plans["control"] = plan.control()
    if args.only:
        plans = {args.only: plans[args.only]}
    loader, image_ids = build_loader(cfg.dataloader.test, cfg.evaluation.max_images)
    subjects = {}
    for name, its_plan in plans.items():
        view = hourglass.expedite(model, its_plan)
        subjects[name] = Subject(view, find_encoder(view)[1], instantiate(cfg.dataloader.evaluator))
    comparison = compare(
        subjects,
        loader,
        image_ids if cfg.evaluation.max_images is not None else None,
        device=cfg.train.device,
        dtype=getattr(torch, cfg.evaluation.dtype),
        warmup=cfg.evaluation.warmup,
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
    write_report(document, cfg.train.output_dir)
    print(f"\n{describe(document)}\n\n{to_table(document)}\n")
    print(f"written to {os.path.join(cfg.train.output_dir, 'comparison.json')} and comparison.md", flush=True)
    return document


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.overrides)
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        init_process_group(cfg.train.device)
    seed_all_rng(cfg.train.seed + comm.get_rank())
    plan = build_plan(cfg.plan)
    model = instantiate(cfg.model).to(cfg.train.device)
    expedited = hourglass.expedite(model, plan)  # refuses a plan that does not fit before anything is read
    if cfg.train.init_checkpoint:
        load_checkpoint(model, cfg.train.init_checkpoint, cfg.train.allow_partial_checkpoint)
    if args.eval_only:
        run_comparison(cfg, model.eval(), plan, args)
        return

    def evaluate() -> dict:
        document = run_comparison(cfg, model, plan, args)
        return {name: figures["accuracy"] for name, figures in document.get("models", {}).items()}

    train(cfg, expedited if cfg.train.expedite else model, evaluate, args.resume)


def run(args: argparse.Namespace) -> None:
    try:
        main(args)
    except InputError as error:
        # A data loader's worker puts its traceback before the message.
        refuse(str(error).strip().splitlines()[-1].removeprefix("hourglass.errors.InputError: "))


def refuse(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    args = parse()
    logging.captureWarnings(True)
    if args.num_gpus > max(1, torch.cuda.device_count()):
        refuse(
            f"--num-gpus takes at most the number of CUDA devices, {torch.cuda.device_count()}, got {args.num_gpus}: "
            f"on CPUs, torchrun --nproc-per-node {args.num_gpus} train_net.py ... starts processes"
        )
    if args.num_gpus == 1:
        run(args)
    else:
        try:
            launch(run, args.num_gpus, dist_url="auto", args=(args,))
        except ProcessExitedException as error:
            sys.exit(error.exit_code)
