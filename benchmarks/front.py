"""
The README's picture: how much accuracy remains at what speed of the encoder.

    python -m benchmarks.front                                              from the committed figures
    python -m benchmarks.front output/benchmarks/reducers_cpu_float32.json

Draws what `benchmarks.reducers` measured, for light and for dark pages.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from hourglass import InputError
from hourglass.evaluation.figures import label_of
from hourglass.files import check_folder
from hourglass.launch import one_line

FOLDER = Path(__file__).parent
FIGURES = FOLDER / "reducers_cpu.json"
#: The curve: this reducer's plans, calibrated where those were measured.
CURVE, CALIBRATED = "GridMerging, ", ", calibrated"
AFFINE, LEFT_OUT = "an affine map in their place (control)", "blocks left out (control)"


class Theme(NamedTuple):
    """Colours that read on a page's background, the one of GitHub."""

    text: str
    faint: str
    lossless: str
    plan: str
    curve: str


THEMES = {
    "light": Theme(text="#1f2328", faint="#6e7781", lossless="#1a7f37", plan="#bc4c00", curve="#0969da"),
    "dark": Theme(text="#e6edf3", faint="#8b949e", lossless="#3fb950", plan="#f0883e", curve="#58a6ff"),
}


class Point(NamedTuple):
    """A row of the benchmark: times the unmodified encoder's speed, and the accuracy kept in percent."""

    speed: float
    kept: float
    low: float
    high: float
    tokens: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "figures", nargs="?", default=str(FIGURES), help="the JSON of benchmarks.reducers (default: the committed one)"
    )
    parser.add_argument("--output", default=str(FOLDER), metavar="FOLDER", help="of front_light.png and front_dark.png")
    return parser.parse_args(arguments)


def read(path: str) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"figures takes the JSON of benchmarks.reducers, {path} cannot be read ({error})") from error
    rows = document.get("models", {}) if isinstance(document, dict) else {}
    lacking = {"unmodified", "fast attention", "the config's plan", LEFT_OUT} - rows.keys()
    if lacking or not find_curve(rows):
        raise InputError(f"figures takes the JSON of benchmarks.reducers, {path} lacks rows of it")
    return document


def find_curve(rows: dict[str, Any]) -> list[str]:
    """The names of the curve's rows."""
    names = [name for name in rows if name.startswith(CURVE)]
    calibrated = [name for name in names if name.endswith(CALIBRATED)]
    return calibrated or names


def to_point(row: dict[str, Any], key: str) -> Point:
    kept = row["retention"][key]
    return Point(row["speedup"]["ratio"], *(100 * kept[name] for name in ("ratio", "low", "high")), 100 * row["tokens"])


def draw(document: dict[str, Any], theme: Theme, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = document["models"]
    keys = list(rows["unmodified"]["retention"])
    key = "segm.AP" if "segm.AP" in keys else keys[0]
    points = {name: to_point(row, key) for name, row in rows.items()}
    figure, axes = plt.subplots(figsize=(9, 4.7), layout="constrained")

    def mark(name: str, color: str, marker: str) -> Point:
        point = points[name]
        bar = [[point.kept - point.low], [point.high - point.kept]]
        axes.errorbar(
            point.speed, point.kept, yerr=bar, color=color, marker=marker, markersize=11, linewidth=1.5, zorder=3
        )
        return point

    def say(point: Point, text: str, color: str, offset: tuple[int, int], align: str = "center", **style) -> None:
        axes.annotate(
            text,
            (point.speed, point.kept),
            xytext=offset,
            textcoords="offset points",
            ha=align,
            va="bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center",
            color=color,
            fontsize=14,
            **style,
        )

    say(mark("unmodified", theme.faint, "o"), "unmodified", theme.faint, (0, 14))
    fast = mark("fast attention", theme.lossless, "o")
    say(fast, f"fast attention\nlossless, {fast.speed:.1f}x", theme.lossless, (0, -14))
    curve = sorted((points[name] for name in find_curve(rows)), key=lambda point: point.speed)
    axes.plot(*zip(*[(point.speed, point.kept) for point in curve]), color=theme.curve, linewidth=3)
    for name in find_curve(rows):
        mark(name, theme.curve, "o")
    for point in curve[:-1]:
        say(point, f"{point.tokens:.0f} %", theme.curve, (0, -26))
    say(curve[len(curve) // 2], "fewer tokens", theme.curve, (0, 26), "left", weight="bold")
    last = curve[-1]
    told = f"{last.kept:.0f} % kept at {last.speed:.1f}x\nwith {last.tokens:.0f} % of tokens"
    say(last, told, theme.curve, (14, 0), "left")
    plan = mark("the config's plan", theme.plan, "*")
    say(plan, f"the demo's plan: {plan.kept:.1f} %", theme.plan, (6, 26), "right")
    for name, text in ((AFFINE, "an affine map\nin their place"), (LEFT_OUT, "those blocks\nleft out")):
        if name in points:
            point = mark(name, theme.faint, "X")
            say(point, f"{text}: {point.kept:.0f} %", theme.faint, (-14, 0), "right")
    axes.text(
        0.01,
        0.03,
        f"{document['config']}, blocks {document['start']} to {document['stop'] - 1} on fewer tokens\n"
        f"{document['images']} images, {document['device']}, {document['dtype']}; bars are 95 % intervals",
        transform=axes.transAxes,
        color=theme.faint,
        fontsize=10.5,
    )

    low = min(point.low for name, point in points.items() if name == LEFT_OUT or name in find_curve(rows))
    high = max(point.speed for point in points.values())
    axes.set_xlim(0.6, high + 0.6)
    axes.set_ylim(10 * (low // 10) - 10, 112)
    axes.set_xticks(range(1, int(high) + 1), [f"{speed}x" for speed in range(1, int(high) + 1)])
    ticks = range(20 * int(-(-low // 20)), 101, 20)
    axes.set_yticks(ticks, [f"{tick} %" for tick in ticks])
    axes.set_xlabel("encoder speed-up", color=theme.text, fontsize=15)
    axes.set_title(f"{label_of(key)} kept", color=theme.text, fontsize=15, loc="left")
    axes.tick_params(colors=theme.text, labelsize=14, length=0)
    axes.grid(axis="y", color=theme.faint, alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    figure.savefig(path, dpi=140, transparent=True, metadata={"Software": None})
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    check_folder("--output", args.output)
    document = read(args.figures)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        draw(document, theme, folder / f"front_{name}.png")
    print(f"written to {folder}: " + " and ".join(f"front_{name}.png" for name in THEMES))


if __name__ == "__main__":
    with one_line():
        main(parse())
