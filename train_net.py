#!/usr/bin/env python
"""
Compare a model with itself on fewer tokens, or train it.

    python train_net.py --eval-only                                   the embedded demo
    python train_net.py --eval-only --config-file configs/vitdet/mask_rcnn_b.py plan.start=4
    python train_net.py --search keep=0.99 --config-file configs/vitdet/mask_rcnn_b.py
    python train_net.py --waterfall --config-file configs/demo/vitdet.py     part by part, what makes it faster
    python train_net.py --predict photo.jpg holiday.mp4 --config-file my_config.py --compare
    python train_net.py --calibrate --config-file configs/nuclei/vitdet.py search.images=16
    python train_net.py --config-file configs/demo/vitdet.py train.output_dir=output/demo
"""

import argparse
import logging
import os
import sys

import hourglass  # first: it mends Detectron2 0.6

# isort: split
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.multiprocessing import ProcessExitedException

from hourglass.checkpoint import load_checkpoint
from hourglass.commands import (
    Options,
    predict,
    run_calibration,
    run_comparison,
    run_search,
    run_waterfall,
    use_folder,
)
from hourglass.compat import init_process_group
from hourglass.data.opening import load_test, open_test
from hourglass.launch import DEMO, build, exit_with_error, leave_out_calibration, load_config, one_line, warn
from hourglass.overrides import is_override
from hourglass.reduction.selection import RANDOM
from hourglass.report import check_report
from hourglass.search.goal import Goal
from hourglass.training import check_training, train

# Task -> the options that it does not take.
COMPARING = ("eval_only", "calibrate", "search", "control", "only", "by_class", "resume")
ALONE = {"waterfall": COMPARING, "predict": (*COMPARING, "waterfall", "images", "agreement")}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(DEMO), help="a LazyConfig (default: configs/demo/vitdet.py)")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="compare the model with itself under the plan; without this or another task, train_net.py trains",
    )
    parser.add_argument(
        "--waterfall",
        action="store_true",
        help="compare fast attention, bfloat16, int8, torch.compile and the plan, each alone and combined, on the "
        "first 100 images unless evaluation.max_images is set",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="fit a correction of what the plan's restoring loses, to search.images images without labels; writes "
        "calibration.pth to train.output_dir, for plan.calibration",
    )
    parser.add_argument(
        "--search",
        nargs="+",
        metavar="GOAL",
        help="find the fastest plan that keeps a share of AP, PQ or mIoU (keep=0.99), or the most accurate one that "
        "is so many times as fast as fast attention (speed=2); labels=none: without looking at labels; seed=0: how its "
        "images are split",
    )
    parser.add_argument(
        "--predict",
        nargs="+",
        metavar="PATH",
        help="draw what the expedited model finds in images, videos and folders of them, and write it as JSON",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="write the results of --predict here (default: predictions in train.output_dir)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="with --predict: also draw the unmodified model's results"
    )
    parser.add_argument("--score", type=float, default=0.5, help="with --predict: lowest score that is drawn (0.5)")
    parser.add_argument(
        "--control",
        action="store_true",
        help="also compare the model without the plan's blocks, and with an affine map in their place",
    )
    parser.add_argument(
        "--agreement", action="store_true", help="also report agreement with the unmodified model; needs no labels"
    )
    parser.add_argument(
        "--report", action="store_true", help="also write report/index.html, a page of what the plan changes"
    )
    parser.add_argument("--images", metavar="FOLDER", help="run on the images of a folder, which need no labels")
    parser.add_argument("--only", choices=("unmodified", "expedited"), help="run only this model")
    parser.add_argument("--by-class", action="store_true", help="also print tables by class, largest loss first")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from train.output_dir: with --eval-only after the finished images, else at the last checkpoint",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="number of GPUs on this machine, a process each"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the config, such as plan.start=4 'plan.reducer.grid=[10,10]' evaluation.max_images=50",
    )
    args = parser.parse_intermixed_args(arguments)
    if args.only and args.control:
        parser.error("--only runs one model: it cannot be used with --control")
    if args.only and (args.agreement or args.report):
        parser.error("--only runs one model, which --agreement and --report cannot compare")
    if args.report and not args.eval_only:
        parser.error("--report needs --eval-only: it is made from a comparison")
    if args.images and not (args.eval_only or args.calibrate or args.search or args.waterfall):
        parser.error("--images takes images without labels: it needs --eval-only, --waterfall, --calibrate or --search")
    if args.calibrate + args.eval_only + (args.search is not None) > 1:
        parser.error(
            "only one of --eval-only, --calibrate and --search can be given, as the first reads what the others write"
        )
    for task, options in ALONE.items():
        conflicting = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name)]
        if getattr(args, task) and conflicting:
            parser.error(f"--{task} cannot be used with {' and '.join(conflicting)}")
    if args.predict is None and (args.output or args.compare):
        parser.error("--output and --compare are for --predict")
    if args.predict is not None:
        overrides = [word for word in args.predict if is_override(word) and not os.path.exists(word)]
        args.overrides += overrides
        args.predict = [word for word in args.predict if word not in overrides]
    if args.search is not None:
        # What has a dot in its name is an override of the config that came after the goal.
        args.overrides += [word for word in args.search if "." in word.partition("=")[0]]
        args.search = [word for word in args.search if "." not in word.partition("=")[0]]
    return args


def main(args: argparse.Namespace) -> None:
    goal = None if args.search is None else Goal.parse(args.search)
    cfg = load_config(args.config_file, args.overrides)
    if args.predict is not None:
        sys.exit(predict(cfg, paths=args.predict, output=args.output, compare=args.compare, score=args.score))
    if args.report:
        check_report(cfg.train.output_dir)
    if args.images:
        use_folder(cfg, args.images)
    if args.calibrate:
        cfg.plan.calibration = None  # it is made anew
    elif not (args.eval_only or args.waterfall) and goal is None:
        check_training(cfg)
        leave_out_calibration(cfg, "training changes the weights")
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        init_process_group(cfg.train.device)
    seed_all_rng(cfg.train.seed)
    plan = build(cfg, "plan")
    model = build(cfg, "model").to(cfg.train.device)
    # Refuses a plan that does not fit before anything is read.
    expedited = hourglass.expedite(model, plan.to_be_calibrated() if args.calibrate else plan)
    if cfg.train.init_checkpoint:
        load_checkpoint(model, cfg.train.init_checkpoint, cfg.train.allow_partial_checkpoint)
    agreement = args.agreement or bool(args.images and not args.only)
    options = Options(agreement, args.control, args.only, args.by_class, args.resume, args.eval_only, args.report)
    if args.eval_only or args.waterfall or args.calibrate or goal is not None:
        if not cfg.train.init_checkpoint:
            warn("train.init_checkpoint is empty, the weights are random")
        if getattr(plan.reducer, "selectors", None) == RANDOM:
            warn(f'plan.reducer.selectors is "{RANDOM}", what they select is random')
        if goal is not None:
            run_search(cfg, model.eval(), goal, args.config_file, args.overrides)
        elif args.calibrate:
            run_calibration(cfg, model.eval(), plan)
        elif args.waterfall:
            run_waterfall(cfg, model.eval(), plan, agreement)
        else:
            run_comparison(cfg, model.eval(), plan, options)
        return

    # What the first evaluation would refuse is refused before training.
    records = open_test(cfg, model, cfg.evaluation.max_images)
    with torch.no_grad():
        for inputs in load_test(cfg, model, records[:1]):
            expedited.eval()(inputs)
    seed_all_rng(cfg.train.seed + comm.get_rank())

    def evaluate() -> dict:
        models = run_comparison(cfg, model, plan, options).get("models", {})
        return {
            f"{name}/{task}/{metric}": float("nan") if value is None else value
            for name, figures in models.items()
            for task, metrics in figures["accuracy"].items()
            for metric, value in metrics.items()
        }

    try:
        train(cfg, expedited if cfg.train.expedite else model, evaluate, args.resume)
    except KeyboardInterrupt:
        checkpoint = os.path.join(cfg.train.output_dir, "last_checkpoint")
        kept = f"--resume goes on from the last checkpoint in {cfg.train.output_dir}"
        raise KeyboardInterrupt(kept if os.path.exists(checkpoint) else "no checkpoint was written yet") from None


def run(args: argparse.Namespace) -> None:
    with one_line():
        main(args)


if __name__ == "__main__":
    args = parse()
    logging.captureWarnings(True)
    if args.num_gpus > max(1, torch.cuda.device_count()):
        exit_with_error(
            f"--num-gpus must be at most the number of CUDA devices, {torch.cuda.device_count()}, got {args.num_gpus}: "
            f"on CPUs, torchrun --nproc-per-node {args.num_gpus} train_net.py ... starts processes"
        )
    if args.num_gpus == 1:
        run(args)
    else:
        try:
            launch(run, args.num_gpus, dist_url="auto", args=(args,))
        except ProcessExitedException as error:
            sys.exit(error.exit_code)
