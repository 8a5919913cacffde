"""The output of a search: a table, a plot of the plans that ran, and a config with the plan."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from hourglass.encoders import Plan
from hourglass.evaluation.figures import label_of
from hourglass.files import write_whole
from hourglass.search.estimate import PRIOR, Slope, counted, discount
from hourglass.search.goal import Goal
from hourglass.search.run import Outcome, Row, key

# An agreement, in percent, to tell people what it is worth.
LIGHT = 95


def to_table(outcome: Outcome, tablefmt: str = "simple") -> str:
    """The plans that ran, the slowest first; below them the answer and its controls on images of the check."""
    if not outcome.rows:
        return "no plan ran"
    first = outcome.rows[0].result
    figures = counted(first)
    headers = ["plan", "images", "encoder", "predicted", "kept, about"]
    headers += [f"agreement, {label_of(figure)}" for figure in figures]
    headers += [f"{label_of(figure)} kept" for figure in figures if first.labelled]
    rows = [_cells(row, figures, " (the answer)" if key(row.plan) == key(outcome.plan) else "") for row in outcome.rows]
    rows += [_cells(row, figures, " (check)") for row in outcome.checked.values()]
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align)


def _cells(row: Row, figures: Sequence[str], suffix: str) -> list[str]:
    result = row.result
    cells = [
        f"{row.name}{suffix}",
        str(row.images),
        f"{result.speed:.2f}x",
        "" if suffix == " (check)" else f"{row.predicted:.2f}x",
        f"{100 * row.kept:.1f} % (over {100 * row.lower:.1f})",
    ]
    cells += [f"{result.agreement[figure][0]:.1f}" for figure in figures]
    return cells + [_labelled(result.labelled.get(figure)) for figure in figures if result.labelled]


def _labelled(samples: np.ndarray | None) -> str:
    if samples is None:
        return ""
    if len(samples) < 2:
        return f"{100 * samples[0]:.1f} %"
    low, high = np.nanpercentile(samples[1:], [2.5, 97.5])
    return f"{100 * samples[0]:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def describe(outcome: Outcome, goal: Goal, about: str) -> str:
    """How the table is to be read."""
    lines = [f"Request for {goal}, on images of {about}: {outcome.why}."]
    if outcome.rows:
        worth = f"about {_worth(PRIOR)}"
        if outcome.slopes:
            figures = (f"{_worth(slope)} ({label_of(key)})" for key, slope in outcome.slopes.items())
            worth = f"on these images {', '.join(figures)}"
        sources = "labels and agreement" if outcome.slopes else "agreement alone"
        lines.append(
            "Speeds are the encoder's, over fast attention alone. What is kept of the figure that loses most is "
            f"estimated from {sources}: where {LIGHT} % agree, {worth} is kept. In parentheses its one-sided 95 % "
            "bound."
        )
        errors = [abs(row.predicted / row.result.speed - 1) for row in outcome.rows]
        lines.append(
            f"Times that were predicted from blocks are off by {100 * np.median(errors):.0f} %, at most by "
            f"{100 * max(errors):.0f} %."
        )
    return "\n".join(lines)


def _worth(slope: Slope) -> str:
    loss, _ = slope.loss(np.array([discount(1 - LIGHT / 100)]))
    return f"{100 * (1 - loss[0]):.1f} %"


def draw(outcome: Outcome, goal: Goal, path: Path) -> None:
    """The plans that ran: what each keeps against the encoder's speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), constrained_layout=True)
    speed = np.array([row.result.speed for row in outcome.rows])
    share = 100 * np.array([row.kept for row in outcome.rows])
    low = np.maximum(share - 100 * np.array([row.lower for row in outcome.rows]), 0)
    axes.errorbar(speed, share, yerr=[low, np.zeros(len(low))], fmt="o", capsize=3, label="plans, with their bounds")
    for row in outcome.rows:
        if key(row.plan) == key(outcome.plan):
            axes.plot(row.result.speed, 100 * row.kept, "*", markersize=16, label=f"the answer: {row.name}")
    if goal.keep is not None:
        axes.axhline(100 * goal.keep, color="grey", linestyle="--", linewidth=1, label=f"keep={goal.keep:g}")
    if goal.speed is not None:
        axes.axvline(goal.speed, color="grey", linestyle="--", linewidth=1, label=f"speed={goal.speed:g}")
    axes.set_xlabel("encoder, times as fast as with fast attention alone")
    axes.set_ylabel("kept, estimated, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_plan(path: Path, plan: Plan, base: str, overrides: Sequence[str], names: Sequence[str], about: str) -> None:
    """
    Write a LazyConfig with the plan, and its calibration beside it.

    Args:
        path: of the config.
        plan: the answer.
        base: the config that was searched for.
        overrides: of it, such as "model.roi_heads.num_classes=3".
        names: what the base exports, or has by default.
        about: first line of the config.
    """
    # Of the folders that links lead to, as ".." is of those.
    folder, file = os.path.split(base)
    relative = os.path.relpath(os.path.join(os.path.realpath(folder), file), os.path.realpath(path.parent))
    description = plan.describe()
    default = Plan(plan.reducer).describe()
    lines = [
        f"{name}={value!r}"
        for name, value in description.items()
        if name != "calibration" and value != default.get(name)
    ]
    imports = ["Plan"]
    if plan.reducer is not None:
        kind = type(plan.reducer).__name__
        imports.append(kind)
        values = ", ".join(f"{name}={value!r}" for name, value in description["reducer"].items() if name != "name")
        lines.insert(0, f"reducer=L({kind})({values})")
    if plan.calibration is not None:
        plan.calibration.save(path.with_name("calibration.pth"))
        lines.append('calibration=str(Path(__file__).parent / "calibration.pth")')
    body = "".join(f"    {line},\n" for line in lines)
    exported = [name for name in names if name != "plan"]
    text = f'''"""{about}"""

from pathlib import Path

from detectron2.config import LazyCall as L

from hourglass import {", ".join(sorted(imports))}
from hourglass.launch import load_config

_base = load_config(str(Path(__file__).resolve().parent / {relative!r}), {list(overrides)!r})
{", ".join(exported)} = (_base[name] for name in {exported!r})

plan = L(Plan)(
{body})
'''
    write_whole(path, text)
