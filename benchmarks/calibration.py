"""
Which images a calibration needs: the error that plans leave, and the AP that they keep, calibrated on few or many
images, on images of one kind alone, and with form, ridge and rank given instead of chosen.

    python -m benchmarks.calibration --config-file configs/nuclei/vitdet.py --by image_type
    python -m benchmarks.calibration --images 100 --counts 3 16 plan.stop=5
"""

import argparse
import sys
import warnings
from collections.abc import Iterable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import hourglass  # first: it mends Detectron2 0.6

# isort: split
import numpy as np
import torch
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from benchmarks.encoder import machine, save
from benchmarks.reducers import kinds_of
from hourglass import InputError, Plan
from hourglass.checkpoint import load_checkpoint
from hourglass.checks import check_count
from hourglass.data.opening import load_test, open_search_records, open_test, search_dataset
from hourglass.encoders import find_encoder
from hourglass.encoders.visiting import visiting
from hourglass.evaluation import Comparison, Subject, compare
from hourglass.evaluation.figures import label_of, limit_of
from hourglass.evaluation.report import describe_interval, without_nan
from hourglass.files import check_folder
from hourglass.fitting import FOLDS, FORMS, RANKS, RIDGES, Fit, Moments, Recorder, fit, to_calibration
from hourglass.launch import DEMO, build, build_evaluator, load_config, one_line

# Images of a calibration, where nothing else is said.
USUAL = 16
WITHOUT = "not calibrated"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(DEMO), help="a LazyConfig; without one, the demo's")
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=[2, 3, 6, 12, 16, 48],
        metavar="N",
        help="calibrate on so many images (default: 2 3 6 12 16 48)",
    )
    parser.add_argument(
        "--by",
        metavar="KEY",
        help="also calibrate on images of each kind alone, by this key of the images in the data set's JSON",
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="images of the test set that are evaluated (default: all)"
    )
    parser.add_argument(
        "--ap", action=argparse.BooleanOptionalAction, default=True, help="also evaluate the AP that is kept"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output", default="output/benchmarks", metavar="FOLDER", help="folder of the table and the JSON"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the config, such as plan.stop=9"
    )
    return parser.parse_intermixed_args(arguments)


class Observed(NamedTuple):
    """
    Images, as a plan's restoring leaves them.

    Attributes:
        moments: number of a stage's first block -> those of each image.
        kinds: what each image is, "" where nothing is told.
    """

    moments: dict[int, list[Moments]]
    kinds: list[str]

    def indices(self, kind: str) -> list[int]:
        return [i for i, name in enumerate(self.kinds) if name == kind]


def observe(
    view: nn.Module, plan: Plan, images: Iterable[list[dict[str, Any]]], kinds: list[str], title: str
) -> Observed:
    recorder = Recorder(plan.proportional, folds=len(kinds))
    with visiting(view, recorder) as run:
        for i, inputs in enumerate(tqdm(images, desc=title, total=len(kinds), unit="image", dynamic_ncols=True)):
            recorder.fold = i
            run(inputs)
    return Observed(recorder.moments, kinds)


def choose(count: int, total: int) -> list[int]:
    """So many of the images, spread evenly over them."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def fit_images(observed: Observed, chosen: list[int], **options: Any) -> dict[int, Fit]:
    folds = [chosen[first::FOLDS] for first in range(FOLDS)]
    return {
        first: fit([reduce(add, [moments[i] for i in fold]) for fold in folds if fold], **options)
        for first, moments in observed.moments.items()
    }


def fit_all(observed: Observed, counts: list[int]) -> dict[str, tuple[dict[int, Fit], int]]:
    """Name of a calibration -> its fits, and how many images they are of."""
    total = len(observed.kinds)
    fits = {
        f"{count} images": (fit_images(observed, choose(count, total)), count) for count in counts if count <= total
    }
    for kind in sorted(set(observed.kinds) - {""}):
        of_kind = observed.indices(kind)
        if len(of_kind) >= 4:
            chosen = [of_kind[i] for i in choose(min(USUAL, len(of_kind)), len(of_kind))]
            fits[f"{len(chosen)} of {kind} alone"] = fit_images(observed, chosen), len(chosen)
            fits[f"{len(chosen)} of {kind} alone, without a guard"] = (
                fit_images(observed, chosen, guard=False),
                len(chosen),
            )
    usual = choose(min(USUAL, total), total)
    for form in FORMS:
        for share in RANKS:
            rank = "C" if share == 1 else f"C / {round(1 / share)}"
            fits[f"{len(usual)}, {form}, rank {rank}"] = (
                fit_images(observed, usual, forms=(form,), shares=(share,)),
                len(usual),
            )
    for ridge in (1e-6, *RIDGES, 1.0):
        fits[f"{len(usual)}, ridge {ridge:g}"] = fit_images(observed, usual, ridges=(ridge,)), len(usual)
    fits[f"{len(usual)}, without a guard"] = fit_images(observed, usual, guard=False), len(usual)
    return fits


def remaining_error(fits: dict[int, Fit] | None, observed: Observed, chosen: list[int]) -> float:
    """Share of the blocks' output's variance, in the mean over stages, that is wrong on some images."""
    shares = []
    for first, moments in observed.moments.items():
        images = [moments[i] for i in chosen]
        total = reduce(add, images)
        shares.append(total.square / total.variance if fits is None else fits[first].remaining_on(images))
    return float(np.mean(shares))


def corrected(fits: dict[int, Fit], observed: Observed) -> float:
    """Share of the correction that images get, in the mean."""
    return float(
        np.mean([fits[first].share_of(image) for first, moments in observed.moments.items() for image in moments])
    )


def to_document(
    fits: dict[str, tuple[dict[int, Fit], int]],
    observed: Observed,
    comparison: Comparison | None,
    plan: Plan,
    about: str,
) -> dict[str, Any]:
    kinds = {kind: observed.indices(kind) for kind in sorted(set(observed.kinds) - {""})}
    rows = {}
    for name, (fitted, _) in {WITHOUT: (None, 0), **fits}.items():
        row: dict[str, Any] = {"left": remaining_error(fitted, observed, list(range(len(observed.kinds))))}
        row["left by kind"] = {kind: remaining_error(fitted, observed, chosen) for kind, chosen in kinds.items()}
        if fitted is not None:
            row["corrected"] = corrected(fitted, observed)
            row["fits"] = [
                {"form": stage_fit.form, "ridge": stage_fit.ridge, "rank": stage_fit.rank}
                for stage_fit in fitted.values()
            ]
        if comparison is not None and name in comparison.models:
            row["retention"] = {key: share._asdict() for key, share in comparison.retention(name).items()}
        rows[name] = row
    return {
        "plan": plan.describe(),
        "about": about,
        "images": len(observed.kinds),
        "images by kind": {kind: len(chosen) for kind, chosen in kinds.items()},
        "max_detections": None if comparison is None else comparison.max_detections,
        "rows": rows,
    }


def to_table(document: dict[str, Any]) -> str:
    """In GitHub's Markdown."""
    rows, kinds = document["rows"], document["images by kind"]
    figures = list(next(iter(rows.values())).get("retention", {}))
    limit = document["max_detections"]
    headers = [
        "calibrated on",
        "form, ridge, rank",
        "corrected",
        "error left, %",
        *(f"{kind}, {count}" for kind, count in kinds.items()),
        *(f"{label_of(key)} kept{limit_of(key, limit)}" for key in figures),
    ]
    table = []
    for name, row in rows.items():
        method = "; ".join("{form}, {ridge:g}, {rank}".format(**stage_fit) for stage_fit in row.get("fits", []))
        remaining = [row["left"], *row["left by kind"].values()]
        kept = [describe_interval(row["retention"][key]) if "retention" in row else "" for key in figures]
        share = f"{100 * row['corrected']:.0f} %" if "corrected" in row else ""
        table.append([name, method, share, *(f"{100 * error:.2f}" for error in remaining), *kept])
    align = ["left", "left"] + ["right"] * (len(headers) - 2)
    return tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=align)


def main(args: argparse.Namespace) -> None:
    for count in args.counts:
        check_count("--counts", count, 2)
    if args.images is not None:
        check_count("--images", args.images, 1)
    check_folder("--output", args.output)
    warnings.filterwarnings("ignore", category=FutureWarning)
    cfg = load_config(args.config_file, [f"train.device={args.device}", "plan.calibration=null", *args.overrides])
    seed_all_rng(cfg.train.seed)
    plan, model = build(cfg, "plan"), build(cfg, "model").to(cfg.train.device).eval()
    if plan.reducer is None:
        raise InputError("the config's plan has no reducer: there is nothing to calibrate")
    load_checkpoint(model, cfg.train.init_checkpoint)
    about = search_dataset(cfg)
    candidates, load = open_search_records(cfg, model, 10**9 if args.by else max(*args.counts, USUAL))
    kinds = kinds_of(about, candidates, args.by) if args.by else [""] * len(candidates)
    # Of each kind as many as a calibration of it takes, and those that a calibration of all takes.
    needed = set(choose(min(max(*args.counts, USUAL), len(candidates)), len(candidates)))
    for kind in set(kinds):
        of_kind = [i for i, image_kind in enumerate(kinds) if image_kind == kind]
        needed |= {of_kind[i] for i in choose(min(USUAL, len(of_kind)), len(of_kind))} if args.by else set()
    records = [candidates[i] for i in sorted(needed)]
    kinds = [kinds[i] for i in sorted(needed)]
    test = open_test(cfg, model, args.images)
    view = hourglass.expedite(model, plan.to_be_calibrated())
    observed = observe(view, plan, load(records), kinds, "images to calibrate on")
    test_names = str(cfg.dataloader.test.dataset.names)
    test_kinds = kinds_of(test_names, test, args.by) if args.by else [""] * len(test)
    unseen = observe(view, plan, load_test(cfg, model, test), test_kinds, "images of the test set")
    fits = fit_all(observed, sorted(args.counts))
    comparison = None
    if args.ap:
        subjects = {"unmodified": Subject(model, find_encoder(model)[1], build_evaluator(cfg, "unmodified"))}
        for name, (fitted, count) in {WITHOUT: (None, 0), **fits}.items():
            model_plan = plan if fitted is None else plan.calibrated(to_calibration(fitted, view, plan, count, about))
            expedited = hourglass.expedite(model, model_plan)
            subjects[name] = Subject(expedited, find_encoder(expedited)[1], build_evaluator(cfg, name))
        comparison = compare(
            subjects,
            load_test(cfg, model, test),
            device=cfg.train.device,
            dtype=getattr(torch, cfg.evaluation.dtype),
            warmup=1,
            title=f"comparing {len(subjects)} models",
        )
        if comparison is not None:
            for line in comparison.warnings():
                print(f"warning: {line}", file=sys.stderr)
    document = without_nan({**to_document(fits, unseen, comparison, plan, about), **machine(cfg.train.device)})
    table = to_table(document)
    print(f"\n{plan!r}, calibrated on images of {about}; figures of {document['images']} images\n\n{table}\n")
    save(Path(args.output), "calibration", document, table)
    print(f"written to {Path(args.output) / 'calibration'}.json and .md")


if __name__ == "__main__":
    with one_line():
        main(parse())
