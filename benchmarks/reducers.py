"""
Every reducer on a trained model at three budgets of tokens: what accuracy each keeps, at what speed.

    python -m benchmarks.reducers                                       the demo's ViTDet
    python -m benchmarks.reducers --images 100 --budgets 0.5 0.3
    python -m benchmarks.reducers --config-file configs/nuclei/vitdet.py --images 61 --by image_type --sides 10 20
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import hourglass  # first: it mends Detectron2 0.6

# isort: split
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.registry import locate
from omegaconf import ListConfig
from tabulate import tabulate

from benchmarks.encoder import machine, save
from hourglass import (
    BipartiteMatching,
    InputError,
    LinearBlocks,
    Plan,
    SkipBlocks,
    TokenClustering,
    TokenSelection,
    reduction,
)
from hourglass.checkpoint import load_checkpoint
from hourglass.checks import check_count
from hourglass.data.opening import load_test, open_search, open_test, search_dataset
from hourglass.encoders import find_encoder
from hourglass.evaluation import Comparison, InstanceEvaluator, Subject, compare
from hourglass.evaluation.figures import label_of, limit_of, split_key
from hourglass.evaluation.instances import average_precision
from hourglass.evaluation.journal import members
from hourglass.evaluation.report import describe_interval, without_nan
from hourglass.evaluation.resampling import draw_samples, ratio_of_samples
from hourglass.files import check_folder
from hourglass.fitting import TOGETHER, calibrate_plans
from hourglass.launch import build, build_evaluator, load_config, one_line
from hourglass.reduction import GridReducer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo" / "vitdet.py"
# Blocks that the demo's model needs: without them it keeps half of its AP.
BLOCKS = (2, 6)
BUDGETS = (0.6, 0.4, 0.25)
# Sides of cells that global blocks' keys are pooled to.
POOLED = (2, 4)
CALIBRATED = ", calibrated"
# Of the plot's axis of AP kept, in %.
TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 97, 98, 99, 100, 101, 102, 104, 106, 110)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(CONFIG), help="a LazyConfig of a ViTDet; without one, the demo's")
    parser.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        default=BLOCKS,
        metavar=("START", "STOP"),
        help="run blocks START to STOP - 1 on fewer tokens (default: {} {})".format(*BLOCKS),
    )
    parser.add_argument("--by", metavar="KEY", help="also a table by this key of the images in the data set's JSON")
    parser.add_argument(
        "--sides",
        type=float,
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="also a table by the objects' size, split at these sides (square roots of areas)",
    )
    parser.add_argument("--images", type=int, default=50, metavar="N", help="validation images (default: 50)")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=list(BUDGETS),
        metavar="SHARE",
        help="shares of the tokens that remain, in the mean over the plan's blocks "
        f"(default: {' '.join(map(str, BUDGETS))})",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="by autocast")
    parser.add_argument(
        "--output", default="output/benchmarks", metavar="FOLDER", help="folder of table, JSON and plot"
    )
    return parser.parse_args(arguments)


def make_plans(
    budgets: list[float], window: int, start: int, stop: int, default: Plan, selectors: str = ""
) -> dict[str, Plan]:
    """
    Name -> plan, the unmodified model first. Those to be calibrated are named so, or need it. A reducer to a grid is in
    it once `hourglass.reduction` has it; the others each spend a budget in a way of their own.

    Args:
        budgets: shares of the tokens that remain.
        window: tokens a side of the model's windows.
        start, stop: the plans' blocks.
        default: the config's own plan.
        selectors: trained weights of `TokenSelection`, with {} for a budget in percent; where there are none, it is
            left out with a warning.
    """
    plans = {"unmodified": Plan(), "fast attention": Plan(attention="fast"), "the config's plan": default}
    kinds = [each for each in vars(reduction).values() if isinstance(each, type) and issubclass(each, GridReducer)]
    kinds.remove(GridReducer)
    for budget in budgets:
        side = max(1, round(window * budget**0.5))
        grid = (side, side)
        at = f"{100 * budget:.0f} %"
        for kind in kinds:
            plan = Plan(kind(grid), start, stop, scope="window")
            plans |= {f"{kind.__name__}, {at}{suffix}": plan for suffix in ("", CALIBRATED)}
        reducer = TokenClustering.published(grid)
        plans[f"TokenClustering.published, {at}"] = Plan(reducer, start, stop, scope="window", published=True)
        reducer = BipartiteMatching(merged_a_block(budget, window**2, stop - start))
        plans[f"BipartiteMatching, {at}"] = Plan(reducer, start, stop, scope="window")
        trained = selectors.format(f"{100 * budget:.0f}")
        if os.path.isfile(trained):
            plans[f"TokenSelection, {at}"] = Plan(TokenSelection(trained, target=budget), start, stop)
        else:
            print(f"warning: TokenSelection at {at} is left out, it has no trained selectors", file=sys.stderr)
    for keys in POOLED:
        plans[f"global keys of {keys} x {keys} tokens"] = Plan(keys=keys)
    plans["an affine map in their place (control)"] = Plan(LinearBlocks(), start, stop)
    plans["blocks left out (control)"] = Plan(SkipBlocks(), start, stop)
    return plans


def merged_a_block(budget: float, full: int, blocks: int) -> int:
    """How many of ``full`` tokens to merge in each block, so that the blocks leave ``budget`` of them in the mean."""

    def mean_remaining(r: int) -> float:
        reducer, remaining, total = BipartiteMatching(r), full, 0
        for _ in range(blocks):
            remaining = reducer.remaining(remaining, full)
            total += remaining
        return total / (blocks * full)

    return min(range(full // 2 + 1), key=lambda r: abs(mean_remaining(r) - budget))


class Measured(NamedTuple):
    """
    Attributes:
        comparison: of the models under the plans.
        plans: name -> plan.
        instances: name -> what evaluated its boxes and masks, after evaluation.
        groups: what :option:`--by` parts the images by -> their ids; empty without it.
    """

    comparison: Comparison
    plans: dict[str, Plan]
    instances: dict[str, InstanceEvaluator]
    groups: dict[str, list]


def measure(args: argparse.Namespace) -> Measured:
    cfg = load_config(args.config_file, [f"train.device={args.device}"])
    args.device = cfg.train.device
    nodes = cfg.dataloader.evaluator
    for node in nodes if isinstance(nodes, ListConfig) else [nodes]:
        if (locate(node._target_) if isinstance(node._target_, str) else node._target_) is InstanceEvaluator:
            node.sides = list(args.sides)
    seed_all_rng(cfg.train.seed)
    start, stop = args.blocks
    config = Path(args.config_file)
    selectors = str(config.with_name(f"{config.stem}_selectors_{{}}.pth"))
    plans = make_plans(args.budgets, cfg.model.backbone.net.window_size, start, stop, build(cfg, "plan"), selectors)
    model = build(cfg, "model").to(args.device).eval()
    load_checkpoint(model, cfg.train.init_checkpoint)
    records = open_test(cfg, model, args.images)
    groups = part_images(cfg.dataloader.test.dataset.names, records, args.by) if args.by else {}
    calibrated = [
        name
        for name, plan in plans.items()
        if name.endswith(CALIBRATED) or plan.reducer is not None and plan.reducer.needs_calibration
    ]
    for first in range(0, len(calibrated), TOGETHER):
        names = calibrated[first : first + TOGETHER]
        given = [plans[name] for name in names]
        fitted = calibrate_plans(model, given, open_search(cfg, model), search_dataset(cfg))
        plans |= {name: plans[name].calibrated(calibration) for name, calibration in zip(names, fitted)}
    instances, subjects = {}, {}
    for name, plan in plans.items():
        view = hourglass.expedite(model, plan)
        evaluator = build_evaluator(cfg, name)
        instances[name] = next(member for member in members(evaluator) if isinstance(member, InstanceEvaluator))
        subjects[name] = Subject(view, find_encoder(view)[1], evaluator)
    comparison = compare(
        subjects,
        load_test(cfg, model, records),
        device=args.device,
        dtype=getattr(torch, args.dtype),
        warmup=1,
        title=f"comparing {len(subjects)} models",
    )
    return Measured(comparison, plans, instances, groups)


def part_images(dataset: str, records: list[dict[str, Any]], key: str) -> dict[str, list]:
    """What the data set's JSON has under ``key`` of an image -> the ids of the images that are run."""
    groups: dict[str, list] = {}
    for record, kind in zip(records, kinds_of(dataset, records, key)):
        groups.setdefault(kind, []).append(record["image_id"])
    return dict(sorted(groups.items()))


def kinds_of(dataset: str, records: list[dict[str, Any]], key: str) -> list[str]:
    """What the data set's JSON has under ``key`` of each image."""
    with open(MetadataCatalog.get(dataset).json_file) as file:
        values = {image["id"]: image.get(key) for image in json.load(file)["images"]}
    for record in records:
        if values[record["image_id"]] is None:
            raise InputError(
                f"--by must be a key of the JSON's images, got {key!r}: image {record['image_id']} lacks it"
            )
    return [str(values[record["image_id"]]) for record in records]


def to_document(measured: Measured, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, for programs: times in ms, shares of the unmodified model's figures."""
    comparison, full = measured.comparison, measured.comparison.models["unmodified"]
    rows = {}
    for name, plan in measured.plans.items():
        figures = comparison.models[name]
        reduction = float(np.median(figures.runs["reduction"]))
        tokens = 1.0
        if plan.reducer is not None:
            tokens = float(np.mean(figures.runs["middle"] / figures.runs["full"]))
        kept = comparison.retention(name)
        rows[name] = {
            "plan": plan.describe(),
            "tokens": tokens,
            "accuracy": {key: figures.accuracy[task][metric] for key in kept for task, metric in [split_key(key)]},
            "retention": {key: share._asdict() for key, share in kept.items()},
            "speedup": comparison.speedup(name, "encoder")._asdict(),
            "encoder_ms": float(np.median(figures.runs["encoder"])),
            "reduction_ms": reduction,
            "reduction_share": reduction / float(np.median(figures.runs["encoder"])),
            "encoder_gflops": figures.encoder_gflops,
        }
    for key in rows["unmodified"]["retention"]:
        points = {name: (row["speedup"]["ratio"], row["retention"][key]["ratio"]) for name, row in rows.items()}
        front = pareto_front(points)
        for name, row in rows.items():
            row.setdefault("front", {})[key] = name in front
    return {
        "config": os.path.relpath(args.config_file, ROOT),
        "device": args.device,
        "dtype": args.dtype,
        **machine(args.device),
        "images": len(full.runs["total"]),
        "max_detections": comparison.max_detections,
        "start": args.blocks[0],
        "stop": args.blocks[1],
        "models": rows,
        "parts": to_parts(measured),
    }


def to_parts(measured: Measured) -> dict[str, dict[str, Any]]:
    """
    Mask AP of the groups of images, and of the objects of some sizes: what it is called -> the number of images or
    objects, and for each model its AP and the share of the unmodified model's that it keeps.
    """
    first = measured.instances["unmodified"]
    parts = {}
    for group, ids in measured.groups.items():
        chosen = np.isin(first.image_ids, ids)
        drawn = draw_samples(len(ids))
        weights = np.zeros((len(drawn), len(chosen)), int)
        weights[:, chosen] = drawn
        samples = {name: evaluator.resample(weights)["segm.AP"] for name, evaluator in measured.instances.items()}
        parts[group] = {"images": len(ids), **_part(samples)}
    for low, high in first.matches_of_size:
        of_size = {name: evaluator.matches_of_size[low, high]["segm"] for name, evaluator in measured.instances.items()}
        weights = draw_samples(len(first.image_ids))
        samples = {name: average_precision(matches, weights) for name, matches in of_size.items()}
        objects = sum(int(category.objects.sum()) for category in of_size["unmodified"])
        size = f"{low:g} to {high:g} px" if high < 1e5 else f"over {low:g} px"
        parts[size] = {"objects": objects, **_part(samples)}
    return parts


def _part(samples: dict[str, np.ndarray]) -> dict[str, Any]:
    kept = {name: ratio_of_samples(samples["unmodified"], values)._asdict() for name, values in samples.items()}
    return {"accuracy": {name: float(values[0]) for name, values in samples.items()}, "retention": kept}


def pareto_front(points: dict[str, tuple[float, float]]) -> set[str]:
    """The names of those points that no other beats in one figure without being worse in the other."""
    return {
        name
        for name, point in points.items()
        if not any(rival != point and all(a >= b for a, b in zip(rival, point)) for rival in points.values())
    }


def to_table(document: dict[str, Any], tablefmt: str = "github") -> str:
    figures = list(document["models"]["unmodified"]["retention"])
    limit = document["max_detections"]
    headers = [
        "reducer, budget",
        "tokens",
        *(f"{label_of(key)} kept{limit_of(key, limit)}" for key in figures),
        "encoder speed-up",
        "encoder, ms",
        "reducing and restoring, ms",
        "of the encoder",
        "on the front",
    ]
    rows = []
    for name, row in document["models"].items():
        reduces = row["reduction_ms"] > 0
        rows.append(
            [
                name,
                f"{100 * row['tokens']:.0f} %",
                *(describe_interval(row["retention"][key]) for key in figures),
                "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**row["speedup"]),
                f"{row['encoder_ms']:.0f}",
                f"{row['reduction_ms']:.1f}" if reduces else "",
                f"{100 * row['reduction_share']:.1f} %" if reduces else "",
                ", ".join(label_of(key).split()[0] for key in figures if row["front"][key]),
            ]
        )
    return _tabulate(rows, headers, tablefmt)


def to_parts_table(document: dict[str, Any], tablefmt: str = "github") -> str:
    """Mask AP by group of images and by size: the unmodified model's in percent, the share that the others keep."""
    parts = document["parts"]
    counts = {}
    for name, part in parts.items():
        kind, count = next(iter(part.items()))
        counts[name] = f"{count} {kind if count > 1 else kind[:-1]}"
    headers = [label_of("segm.AP", document["max_detections"]), *(f"{name}, {count}" for name, count in counts.items())]
    rows = [["unmodified, AP", *(f"{part['accuracy']['unmodified']:.1f}" for part in parts.values())]]
    for name in list(document["models"])[1:]:
        rows.append([f"{name}, kept", *(describe_interval(part["retention"][name]) for part in parts.values())])
    return _tabulate(rows, headers, tablefmt)


def _tabulate(rows: list[list[str]], headers: list[str], tablefmt: str) -> str:
    return tabulate(
        rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )


def _by_loss(kept: np.ndarray) -> np.ndarray:
    lost = 100 - kept
    return -np.sign(lost) * np.log1p(np.abs(lost))


def _from_loss(scaled: np.ndarray) -> np.ndarray:
    return 100 + np.sign(scaled) * np.expm1(np.abs(scaled))


def plot(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = list(document["models"]["unmodified"]["retention"])
    figure, panels = plt.subplots(1, len(figures), figsize=(6.5 * len(figures), 6), layout="constrained", squeeze=False)
    panels = panels[0]
    kinds = list(dict.fromkeys(name.split(",")[0] for name in document["models"]))
    style = {kind: (f"C{i}", "os^Dvph*X"[i % 9]) for i, kind in enumerate(kinds)}
    for axes, key in zip(panels, figures):
        front = []
        for name, row in document["models"].items():
            kind = name.split(",")[0]
            color, marker = style[kind]
            speed, kept = row["speedup"], row["retention"][key]
            if kept["ratio"] is None:  # the unmodified model has no AP on these images
                continue
            x, y = speed["ratio"], 100 * kept["ratio"]
            low, high = (y if kept[end] is None else 100 * kept[end] for end in ("low", "high"))
            axes.errorbar(
                x,
                y,
                xerr=[[x - speed["low"]], [speed["high"] - x]],
                yerr=[[y - low], [high - y]],
                color=color,
                marker=marker,
                markersize=7,
                markerfacecolor="white" if name.endswith(CALIBRATED) else color,
                linewidth=0.8,
                alpha=0.9,
                label=kind if kind not in axes.get_legend_handles_labels()[1] else None,
            )
            budget = name.partition(", ")[2].removesuffix(CALIBRATED).removesuffix(" %")
            axes.annotate(budget, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=color)
            if row["front"][key]:
                front.append((x, y))
        if front:
            axes.plot(*zip(*sorted(front)), color="black", linewidth=1, linestyle="--", zorder=0, label="Pareto front")
        # Plans that keep nearly all are the ones to tell apart: losses are drawn by their logarithm.
        axes.set_yscale("function", functions=(_by_loss, _from_loss))
        bottom, top = axes.get_ylim()
        axes.set_yticks([tick for tick in TICKS if bottom <= tick <= top])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("encoder speed-up, times the unmodified encoder")
        axes.set_ylabel(f"{label_of(key)} kept, %")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(
        f"{document['config']}, blocks {document['start']} to {document['stop'] - 1} on fewer tokens: "
        f"{document['images']} images, {document['device']}, {document['dtype']}.\n"
        "Numbers are budgets in % of the tokens, bars 95 % bootstrap intervals over images; hollow: calibrated. "
        "Losses by logarithm",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    check_count("--images", args.images, 1)
    for budget in args.budgets:
        if not 0 < budget <= 1:
            raise InputError(f"--budgets must be shares of the tokens in (0, 1], got {budget}")
    check_folder("--output", args.output)
    warnings.filterwarnings("ignore", category=FutureWarning)
    measured = measure(args)
    for line in measured.comparison.warnings():
        print(f"warning: {line}", file=sys.stderr)
    document = without_nan(to_document(measured, args))
    table = to_table(document)
    if document["parts"]:
        table += f"\n\n{to_parts_table(document)}"
    folder, name = Path(args.output), f"reducers_{args.device}_{args.dtype}"
    print(f"\n{table}\n")
    save(folder, name, document, table)
    plot(document, folder / f"{name}.png")
    print(f"written to {folder / name}.json, .md and .png")


if __name__ == "__main__":
    with one_line():
        main(parse())
