"""Pictures of two models' detections in an image, and plots of a comparison's figures."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from PIL import Image
from pycocotools import mask as rle

from hourglass.evaluation.figures import find_figure, label_of, split_key
from hourglass.report.losses import CLASS, KEPT, KINDS, Detections, Examined, Segments

# Okabe and Ito's colours, which colour-blind readers tell apart; names of kinds stand beside them wherever they are.
COLOURS = {
    "kept": "#56b4e9",
    "moved": "#e69f00",
    "class changed": "#cc79a7",
    "lost": "#d55e00",
    "duplicate": "#f0e442",
    "new": "#009e73",
    "missed": "#999999",
}
#: The longest side of a picture in pixels, at least and at most.
SMALLEST, LARGEST = 640, 800
#: The longest side of a strip's, one side of which is more than so many times the other.
STRIP_SIDE, STRIP = 1600, 2.5
# With more labels than this a picture is covered by them: the list below it has them all.
LABELS = 40
# Parts of a mask of fewer pixels are not drawn.
SPECK = 16
# matplotlib's text is drawn in this colour, which becomes that of the page.
_INK = "#010203"


class Mark(NamedTuple):
    """A shape to be drawn: its number, a name among `COLOURS` and its label, empty for none."""

    number: int
    colour: str
    label: str


def scaled_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture of an image of that size."""
    longest, shortest = max(size), max(1, min(size))
    largest = STRIP_SIDE if longest > STRIP * shortest else LARGEST
    scale = min(max(longest, SMALLEST), largest) / longest
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def scale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to ``size`` (height, width)."""
    if image.shape[:2] == size:
        return image
    smaller = size[0] < image.shape[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def draw_shapes(picture: np.ndarray, detections: Detections, marks: Sequence[Mark]) -> np.ndarray:
    """
    Args:
        picture: (h, w, 3) uint8 RGB, the image at another scale.
        detections: the shapes, in the image's pixels.
        marks: those to be drawn, the last one on top.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    drawer = Visualizer(picture)
    size = picture.shape[:2]
    labels = []
    for mark in marks:
        still = mark.colour in ("kept", "missed")
        style = {"color": COLOURS[mark.colour], "edge_color": COLOURS[mark.colour], "alpha": 0.2 if still else 0.45}
        before = len(drawer.output.ax.patches)
        if isinstance(detections.shapes, np.ndarray):
            left, top, width, height = detections.shapes[mark.number] * np.divide(size, detections.size)[[1, 0, 1, 0]]
            corners = (left, top, left + width, top + height)
            drawer.draw_box(corners, alpha=1, edge_color=style["edge_color"], line_style="-" if still else "--")
            anchor = left + width / 2, top
        else:
            mask = _without_specks(_mask(detections, mark.number, size))
            if not mask.any():  # a model may give a mask without a pixel
                continue
            drawer.draw_binary_mask(mask, **style)
            outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            if len(drawer.output.ax.patches) == before:  # of a mask with holes it draws no outline
                for outline in outlines:
                    drawer.draw_polygon(outline[:, 0], **{**style, "alpha": 0.0})
            left, top, width, _ = cv2.boundingRect(max(outlines, key=len))
            anchor = left + width / 2, top
        _outline(drawer.output.ax.patches[before:], 1.5 if still else 2.5)
        if mark.label:
            labels.append((mark, anchor))
    points = float(np.sqrt(size[0] * size[1])) / 45
    letter = 0.9 * points  # of a letter, in pixels
    for mark, (x, y) in labels:
        half = letter * len(mark.label) / 2
        x = min(max(x, half), max(half, size[1] - half))
        y = min(max(y - 2.5 * letter, 0), max(0, size[0] - 2.5 * letter))
        drawer.draw_text(mark.label, (x, y), font_size=points, color=COLOURS[mark.colour])
    return drawer.output.get_image()


def _outline(patches: Sequence[Patch], width: float) -> None:
    """Outlines of that many points, with dark edges, so that they show on an image of any colour."""
    for patch in patches:
        patch.set_linewidth(width)
        patch.set_path_effects([Stroke(linewidth=width + 1.5, foreground="#000000", alpha=0.6), Normal()])


def _mask(detections: Detections, number: int, size: tuple[int, int]) -> np.ndarray:
    """(h, w) uint8, at the scale of the picture; what is smaller than a pixel is one."""
    if isinstance(detections.shapes, Segments):
        mask = detections.shapes.mask(number)
    else:
        assert isinstance(detections.shapes, list)
        mask = rle.decode(detections.shapes[number])
    if mask.shape == size:
        return np.ascontiguousarray(mask)
    interpolation = cv2.INTER_AREA if size[0] < mask.shape[0] else cv2.INTER_LINEAR
    share = cv2.resize(np.ascontiguousarray(mask) * np.uint8(255), size[::-1], interpolation=interpolation)
    return ((share > 127) if (share > 127).any() else (share > 0)).astype(np.uint8)


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """(h, w) uint8 without parts of a few pixels, of which a ragged mask has hundreds; its largest part stays."""
    count, labels, parts, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count <= 2:
        return mask
    areas = parts[:, cv2.CC_STAT_AREA]
    shown = areas >= min(SPECK, areas[1:].max())
    shown[0] = False
    return shown[labels].astype(np.uint8)


def marks_of(image: Examined, name: Callable[[int], str]) -> dict[str, list[Mark]]:
    """
    Args:
        image: examined.
        name: of a class.

    Returns:
        "truth", where there are labels, "unmodified" and "expedited" -> what is to be drawn.
    """
    first, second, changes = image.first, image.second, image.changes
    if len(set(first.classes) | set(second.classes)) <= 1:  # whose name would only cover the picture
        name = _no_name
    panels: dict[str, list[Mark]] = {}
    if image.truth is not None and image.found is not None:
        by_first, by_second = image.found
        colours = np.array([["missed", "new"], ["lost", "kept"]])[by_first.astype(int), by_second.astype(int)]
        panels["truth"] = [
            Mark(i, colour, f"{colour} {name(int(number))}".strip() if colour in ("lost", "new") and not crowd else "")
            for i, (colour, number, crowd) in enumerate(zip(colours, image.truth.objects.classes, image.truth.crowd))
        ]
    panels["unmodified"], panels["expedited"] = [], []
    for i, kind in enumerate(changes.first):
        label = name(int(first.classes[i]))
        if kind == CLASS:
            label += f" → {name(int(second.classes[changes.partner[i]]))}"
        panels["unmodified"].append(Mark(i, KINDS[kind], "" if kind == KEPT else _label(kind, label)))
    for i, kind in enumerate(changes.second):
        label = name(int(second.classes[i]))
        panels["expedited"].append(Mark(i, KINDS[kind], "" if kind == KEPT else _label(kind, label)))
    for key, marks in panels.items():
        ordered = sorted(marks, key=lambda mark: mark.colour != "kept")
        labelled = sum(bool(mark.label) for mark in marks) <= LABELS
        panels[key] = ordered if labelled else [mark._replace(label="") for mark in ordered]
    return panels


def _label(kind: int, name: str) -> str:
    return name if kind == CLASS else f"{KINDS[kind]} {name}".strip()


def _no_name(number: int) -> str:
    return ""


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write (h, w, 3) uint8 RGB as JPEG, its colours at full resolution."""
    Image.fromarray(picture).save(path, quality=88, subsampling=0)


# --- the plot -------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A figure, and by how much its interval reaches below and above it."""

    middle: float
    ends: tuple[float, float]

    @classmethod
    def from_interval(cls, middle: float, low: float | None, high: float | None) -> "Bar":
        ends = (middle if end is None else end for end in (low, high))
        low, high = ends
        return cls(middle, (max(0.0, middle - low), max(0.0, high - middle)))


class Point(NamedTuple):
    model: str
    time: Bar
    figure: Bar


def plot_figures(document: dict[str, Any]) -> list[str]:
    """
    Accuracy against the time of an image, a plot for each main figure; of models without labels, agreement.

    Args:
        document: from :func:`~hourglass.evaluation.report.to_json`.

    Returns:
        SVGs whose text has the colour of the page around it.
    """
    return [_plot(title, points) for title, points in accuracy_and_time(document).items()]


def _plot(title: str, points: Sequence[Point]) -> str:
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "hourglass",
        "font.family": "sans-serif",
        "font.size": 11,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            colour, marker = POINTS.get(point.model, (_INK, "o"))
            axes.errorbar(
                point.time.middle,
                point.figure.middle,
                xerr=np.array([point.time.ends]).T,
                yerr=np.array([point.figure.ends]).T,
                fmt=marker,
                color=colour,
                capsize=3,
                markersize=8,
                label=point.model,
            )
        axes.margins(0.1, 0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("an image, ms")
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*_without_error_bars(axes), loc="outside upper left", ncols=3, frameon=False, fontsize=10)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    # Several are in one page, which gives each its width.
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    head, body = drawn.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body


def _without_error_bars(axes: Any) -> tuple[list[Any], list[str]]:
    """Markers and labels of a legend, without the error bars."""
    bars, labels = axes.get_legend_handles_labels()
    return [bar[0] for bar in bars], labels


POINTS = {
    "fast attention": ("#56b4e9", "s"),
    "expedited": ("#d55e00", "D"),
    "control": ("#999999", "v"),
    "linear control": ("#cc79a7", "^"),
}


def accuracy_and_time(document: dict[str, Any]) -> dict[str, list[Point]]:
    """
    Returns:
        name of a main figure -> a point for each model that has it. Its time is the median, with the 10th and the 90th
        percentile; its figure has the paired interval of what it keeps of the unmodified model's.
    """
    models = document["models"]
    times = {name: model["latency_ms"]["total"] for name, model in models.items()}
    bars = {name: Bar.from_interval(time["median"], time["p10"], time["p90"]) for name, time in times.items()}
    kept = {
        "fast attention": document.get("fast_attention", {}).get("retention", {}),
        "expedited": document.get("retention", {}),
        "control": document.get("control_retention", {}),
        "linear control": document.get("linear_control_retention", {}),
    }
    first = next(iter(models))
    curves: dict[str, list[Point]] = {}
    for key in dict.fromkeys(
        f"{task}.{metric}" for task, metrics in models[first]["accuracy"].items() for metric in metrics
    ):
        task, metric = split_key(key)
        figure = find_figure(task, metric)
        unmodified = models[first]["accuracy"][task][metric]
        if figure is None or not figure.main or unmodified is None:
            continue
        points = []
        for name, model in models.items():
            value = model["accuracy"].get(task, {}).get(metric)
            if value is None:
                continue
            share = kept.get(name, {}).get(key, {})
            ends = (None if (end := share.get(side)) is None else unmodified * end for side in ("low", "high"))
            points.append(Point(name, bars[name], Bar.from_interval(value, *ends)))
        curves[label_of(key, document["max_detections"])] = points
    if curves:
        return curves
    agreement = document.get("agreement", {})
    for key in dict.fromkeys(key for figures in agreement.values() for key in figures):
        points = [Point(first, bars[first], Bar.from_interval(100.0, None, None))]
        for name, figures in agreement.items():
            share = {side: None if (end := figures[key][side]) is None else 100 * end for side in figures[key]}
            if share["ratio"] is not None:
                points.append(Point(name, bars[name], Bar.from_interval(share["ratio"], share["low"], share["high"])))
        curves[f"agreement, {label_of(key, document['max_detections'])}"] = points
    return curves
