#!/usr/bin/env python
"""
Draw what a training logged: its losses over the iterations.

    python tools/learning_curve.py output/demo_panoptic/metrics.json --output curve.png
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def read(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Iterations and values of each figure in a ``metrics.json`` of Detectron2's, a JSON document a line."""
    figures: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name != "iteration":
                iterations, values = figures.setdefault(name, ([], []))
                iterations.append(entry["iteration"])
                values.append(value)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="the metrics.json of a training")
    parser.add_argument("--output", type=Path, default=Path("curve.png"), help="the picture (curve.png)")
    parser.add_argument(
        "--figures",
        nargs="+",
        default=["total_loss"],
        metavar="NAME",
        help="what to draw, by its name in the file (total_loss)",
    )
    args = parser.parse_args()
    try:
        figures = read(args.metrics)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        print(f"error: {args.metrics} is no metrics.json of a training ({error})", file=sys.stderr)
        sys.exit(2)
    lacking = [name for name in args.figures if name not in figures]
    if lacking:
        print(f"error: {args.metrics} has {', '.join(sorted(figures))}, not {', '.join(lacking)}", file=sys.stderr)
        sys.exit(2)
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name in args.figures:
        axes.plot(*figures[name], label=name.replace("_", " "), linewidth=1.5)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(args.figures) > 1:
        axes.legend(frameon=False)
    try:
        figure.savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:  # of a folder that is missing, and of an ending that is no picture's
        print(f"error: {args.output} cannot be written ({error})", file=sys.stderr)
        sys.exit(2)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
