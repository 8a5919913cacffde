#!/usr/bin/env python
"""
Every reducer on the demo's model at three budgets of tokens: what AP each keeps, at what speed.

    python benchmarks/reducers.py
    python benchmarks/reducers.py --images 100 --budgets 0.5 0.3
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hourglass  # noqa: E402  (first: it mends Detectron2 0.6)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
from detectron2.config import instantiate  # noqa: E402
from detectron2.utils.env import seed_all_rng  # noqa: E402
from tabulate import tabulate  # noqa: E402

from benchmarks.encoder import machine, save  # noqa: E402
from hourglass import (  # noqa: E402
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    InputError,
    Plan,
    SkipBlocks,
    TokenClustering,
    TokenSelection,
)
from hourglass.checkpoint import load_checkpoint  # noqa: E402
from hourglass.data.loading import build_loader  # noqa: E402
from hourglass.encoders import find_encoder  # noqa: E402
from hourglass.evaluation import Comparison, InstanceEvaluator, Subject, check_folder, compare  # noqa: E402
from hourglass.evaluation.instances import retention_of_ap  # noqa: E402
from hourglass.reduction.reducer import check_count  # noqa: E402
from train_net import build, load_config, refuse  # noqa: E402

CONFIG = ROOT / "configs" / "demo" / "vitdet.py"
SELECTORS = "vitdet_selectors_{:.0f}.pth"  # of a budget in percent, next to the config
# Blocks that the demo's model needs: without them it keeps half of its AP.
START, STOP = 2, 6
BUDGETS = (0.6, 0.4, 0.25)
TASKS = {"bbox": "box AP", "segm": "mask AP"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50, metavar="N", help="validation images (default: 50)")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=list(BUDGETS),
        metavar="SHARE",
        help="shares of the tokens that are left, in the mean over the plan's blocks "
        f"(default: {' '.join(map(str, BUDGETS))})",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="by autocast")
    parser.add_argument("--output", default="output/benchmarks", metavar="FOLDER", help="of table, JSON and plot")
    return parser.parse_args(arguments)


def make_plans(budgets: list[float], window: int, blocks: int) -> dict[str, Plan]:
    """
    Name -> plan, the unmodified model first.

    Args:
        budgets: shares of the tokens that are left.
        window: tokens a side of the model's windows.
        blocks: number of the plan's.
    """
    plans = {"unmodified": Plan(), "fast attention": Plan(attention="fast")}
    for budget in budgets:
        side = max(1, round(window * budget**0.5))
        grid = (side, side)
        at = f"{100 * budget:.0f} %"
        for reducer in (TokenClustering(grid), AveragePooling(grid), DensityPeaks(grid)):
            plans[f"{type(reducer).__name__}, {at}"] = Plan(reducer, START, STOP, scope="window")
        reducer = TokenClustering.published(grid)
        plans[f"TokenClustering.published, {at}"] = Plan(reducer, START, STOP, scope="window", published=True)
        reducer = BipartiteMatching(merged_a_block(budget, window**2, blocks))
        plans[f"BipartiteMatching, {at}"] = Plan(reducer, START, STOP, scope="window")
        selectors = CONFIG.parent / SELECTORS.format(100 * budget)
        if selectors.is_file():
            reducer = TokenSelection(str(selectors), target=budget)
            plans[f"TokenSelection, {at}"] = Plan(reducer, START, STOP)
        else:
            print(f"warning: TokenSelection at {at} is left out, it has no trained selectors", file=sys.stderr)
    plans["blocks left out (control)"] = Plan(SkipBlocks(), START, STOP)
    return plans


def merged_a_block(budget: float, full: int, blocks: int) -> int:
    """How many of ``full`` tokens to merge in each block, so that the blocks leave ``budget`` of them in the mean."""

    def mean_left(r: int) -> float:
        reducer, left, total = BipartiteMatching(r), full, 0
        for _ in range(blocks):
            left = reducer.left(left, full)
            total += left
        return total / (blocks * full)

    return min(range(full // 2 + 1), key=lambda r: abs(mean_left(r) - budget))


def measure(args: argparse.Namespace) -> tuple[Comparison, dict[str, Plan], dict[str, InstanceEvaluator]]:
    cfg = load_config(str(CONFIG), [f"train.device={args.device}"])
    args.device = cfg.train.device
    seed_all_rng(cfg.train.seed)
    model = build(cfg, "model").to(args.device).eval()
    load_checkpoint(model, cfg.train.init_checkpoint)
    loader, records = build_loader(cfg.dataloader.test, args.images)
    plans = make_plans(args.budgets, cfg.model.backbone.net.window_size, STOP - START)
    evaluators, subjects = {}, {}
    cfg.dataloader.evaluator._target_ = InstanceEvaluator
    for name, plan in plans.items():
        view = hourglass.expedite(model, plan)
        evaluators[name] = instantiate(cfg.dataloader.evaluator)
        subjects[name] = Subject(view, find_encoder(view)[1], evaluators[name])
    comparison = compare(
        subjects,
        loader,
        [record["image_id"] for record in records],
        device=args.device,
        dtype=getattr(torch, args.dtype),
        warmup=1,
        what=f"comparing {len(subjects)} models",
    )
    return comparison, plans, evaluators


def to_document(
    comparison: Comparison, plans: dict[str, Plan], evaluators: dict[str, InstanceEvaluator], args: argparse.Namespace
) -> dict[str, Any]:
    """What was measured, for programs: times in ms, shares of the unmodified model's figures."""
    first = evaluators["unmodified"].matches
    full = comparison.models["unmodified"]
    rows = {}
    for name, plan in plans.items():
        measured = comparison.models[name]
        reduction = float(np.median(measured.runs["reduction"]))
        tokens = 1.0
        if plan.reducer is not None:
            tokens = float(np.mean(measured.runs["middle"] / measured.runs["full"]))
        rows[name] = {
            "plan": plan.describe(),
            "tokens": tokens,
            "accuracy": {task: measured.accuracy[task]["AP"] for task in TASKS},
            "retention": {
                task: retention_of_ap(first[task], evaluators[name].matches[task])._asdict() for task in TASKS
            },
            "speedup": comparison.speedup(name, "encoder")._asdict(),
            "encoder_ms": float(np.median(measured.runs["encoder"])),
            "reduction_ms": reduction,
            "reduction_share": reduction / float(np.median(measured.runs["encoder"])),
            "encoder_gflops": measured.encoder_gflops,
        }
    for task in TASKS:
        points = {name: (row["speedup"]["ratio"], row["retention"][task]["ratio"]) for name, row in rows.items()}
        front = pareto_front(points)
        for name, row in rows.items():
            row.setdefault("front", {})[task] = name in front
    return {
        "model": "demo",
        "device": args.device,
        "dtype": args.dtype,
        **machine(args.device),
        "images": len(full.runs["total"]),
        "start": START,
        "stop": STOP,
        "models": rows,
    }


def pareto_front(points: dict[str, tuple[float, float]]) -> set[str]:
    """The names of those points that no other beats in one figure without being worse in the other."""
    return {
        name
        for name, point in points.items()
        if not any(other != point and all(a >= b for a, b in zip(other, point)) for other in points.values())
    }


def to_table(document: dict[str, Any], tablefmt: str = "github") -> str:
    headers = [
        "reducer, budget",
        "tokens",
        *(f"{label} kept" for label in TASKS.values()),
        "encoder speed-up",
        "encoder, ms",
        "reducing and restoring, ms",
        "of the encoder",
        "on the front",
    ]
    rows = []
    for name, row in document["models"].items():
        kept = [
            "{:.1f} % ({:.1f}-{:.1f})".format(*(100 * row["retention"][task][key] for key in ("ratio", "low", "high")))
            for task in TASKS
        ]
        reduces = row["reduction_ms"] > 0
        rows.append(
            [
                name,
                f"{100 * row['tokens']:.0f} %",
                *kept,
                "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**row["speedup"]),
                f"{row['encoder_ms']:.0f}",
                f"{row['reduction_ms']:.1f}" if reduces else "",
                f"{100 * row['reduction_share']:.1f} %" if reduces else "",
                " and ".join(label.split()[0] for task, label in TASKS.items() if row["front"][task]),
            ]
        )
    return tabulate(
        rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )


def plot(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(TASKS), figsize=(13, 6), layout="constrained")
    kinds = list(dict.fromkeys(name.split(",")[0] for name in document["models"]))
    style = {kind: (f"C{i}", "os^Dvph*X"[i % 9]) for i, kind in enumerate(kinds)}
    for axes, (task, label) in zip(panels, TASKS.items()):
        front = []
        for name, row in document["models"].items():
            kind = name.split(",")[0]
            color, marker = style[kind]
            speed, kept = row["speedup"], row["retention"][task]
            x, y = speed["ratio"], 100 * kept["ratio"]
            axes.errorbar(
                x,
                y,
                xerr=[[x - speed["low"]], [speed["high"] - x]],
                yerr=[[y - 100 * kept["low"]], [100 * kept["high"] - y]],
                color=color,
                marker=marker,
                markersize=7,
                linewidth=0.8,
                alpha=0.9,
                label=kind if kind not in axes.get_legend_handles_labels()[1] else None,
            )
            budget = name.partition(", ")[2].removesuffix(" %")
            axes.annotate(budget, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=color)
            if row["front"][task]:
                front.append((x, y))
        axes.plot(*zip(*sorted(front)), color="black", linewidth=1, linestyle="--", zorder=0, label="Pareto front")
        axes.set_xlabel("encoder speed-up, times the unmodified encoder")
        axes.set_ylabel(f"{label} kept, %")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(
        f"The demo's ViTDet, blocks {document['start']} to {document['stop'] - 1} on fewer tokens: "
        f"{document['images']} images, {document['device']}, {document['dtype']}.\n"
        "Numbers are budgets in % of the tokens, bars 95 % bootstrap intervals over images",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    check_count("--images", args.images, 1)
    for budget in args.budgets:
        if not 0 < budget <= 1:
            raise InputError(f"--budgets takes shares of the tokens in (0, 1], got {budget}")
    check_folder("--output", args.output)
    warnings.filterwarnings("ignore", category=FutureWarning)
    document = to_document(*measure(args), args)
    table = to_table(document)
    folder, name = Path(args.output), f"reducers_{args.device}_{args.dtype}"
    print(f"\n{table}\n")
    save(folder, name, document, table)
    plot(document, folder / f"{name}.png")
    print(f"written to {folder / name}.json, .md and .png")


if __name__ == "__main__":
    try:
        main(parse())
    except InputError as error:
        refuse(str(error))
