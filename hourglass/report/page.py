"""The page: tables, plot, pictures and what filters them, in a folder that opens from disk."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation import DatasetEvaluator
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from hourglass.evaluation.agreement import OutputRecorder
from hourglass.evaluation.compare import Comparison
from hourglass.evaluation.figures import label_of
from hourglass.evaluation.instances import InstanceEvaluator, average_precision
from hourglass.evaluation.report import describe, describe_interval, describe_machine, to_table
from hourglass.evaluation.resampling import difference_of_samples, draw_samples, ratio_of_samples
from hourglass.files import printable, write_whole_folder
from hourglass.report import FOLDER, MARK, check_report_folder
from hourglass.report.drawing import COLOURS, draw_shapes, marks_of, plot_figures, save_picture, scale, scaled_size
from hourglass.report.losses import (
    DUPLICATE,
    IGNORED,
    KEPT,
    KINDS,
    LOST,
    NEW,
    OF_FIRST,
    OF_SECOND,
    RIGHT,
    Examined,
    Losses,
    Task,
    find_losses,
    find_tasks,
)
from hourglass.report.tokens import Tokens, draw_tokens

# Samples for the intervals by size: fewer than for those of all sizes, of which there are a third.
SAMPLES = 100
# In lists, what matters most first.
ORDER = ("lost", "class changed", "moved", "duplicate", "new")
MEANING = {
    "kept": "the same class, IoU of at least 0.75",
    "moved": "the same class, box or mask off: IoU from 0.25 to 0.75",
    "class changed": "another class, IoU of at least 0.5",
    "lost": "the expedited model has nothing there",
    "duplicate": "found a second time, by the expedited model alone",
    "new": "from the background, by the expedited model alone",
}


class Material(NamedTuple):
    """
    What a page is made of.

    Attributes:
        document: from :func:`~hourglass.evaluation.to_json`.
        comparison: with models "unmodified" and "expedited".
        evaluators: these two models' own.
        recorders: these two models' outputs.
        records: of the images that ran.
        metadata: of the data set.
        read: a record -> its image (H, W, 3) uint8 RGB.
        tokens: a record -> what the plan runs on in it; None where it has no reducer.
        score: detections of at least this score are looked at.
        images: so many are shown, in all.
    """

    document: dict[str, Any]
    comparison: Comparison
    evaluators: tuple[Sequence[DatasetEvaluator], Sequence[DatasetEvaluator]]
    recorders: tuple[OutputRecorder, OutputRecorder]
    records: Sequence[dict[str, Any]]
    metadata: Metadata
    read: Callable[[dict[str, Any]], np.ndarray]
    tokens: Callable[[dict[str, Any]], Tokens | None]
    score: float
    images: int


def write_page(folder: str | os.PathLike, material: Material) -> Path:
    """
    Write ``report/index.html`` and its pictures into ``folder``, all of them or none; an older report is replaced.

    Returns:
        the path of the page.

    Raises:
        InputError: for labels and images that cannot be read.
    """
    check_report_folder(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    target = Path(folder) / FOLDER
    by_id = {record["image_id"]: record for record in material.records}
    tasks = find_tasks(*material.recorders, material.records, material.metadata, material.score)
    sections = []
    with write_whole_folder(target) as scratch:
        for task in tasks:
            losses = find_losses(task)
            worst = losses.worst(-(-material.images // len(tasks)))
            cards = [
                _card(task, by_id[image_id], scratch, f"{task.name.split()[0]}_{number:02}", material.read)
                for number, image_id in enumerate(tqdm(worst, desc=f"drawing {task.name}", unit="image"), start=1)
            ]
            sections.append(_section(task, losses, cards))
        shown = next((card["id"] for section in sections for card in section["cards"]), material.records[0]["image_id"])
        page = (
            _environment()
            .get_template("page.html")
            .render(
                mark=MARK,
                document=material.document,
                about=describe(material.document),
                machine=describe_machine(material.document),
                tiles=_tiles(material.document),
                table=_plain_table(to_table(material.document, "html")),
                plot=plot_figures(material.document),
                sizes=_by_size(material),
                by_class=_by_class(material),
                sections=sections,
                kinds=KINDS,
                meaning=MEANING,
                colours=COLOURS,
                score=material.score,
                classes=sorted({name for section in sections for card in section["cards"] for name in card["classes"]}),
                tokens=_tokens(material, by_id[shown], scratch),
            )
        )
        (scratch / "index.html").write_text(page, encoding="utf-8")
    return target / "index.html"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hourglass.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = lambda value, digits=1: "-" if value is None else f"{value:.{digits}f}"
    environment.filters["slug"] = lambda text: re.sub(r"\W+", "-", text)
    return environment


def _plain_table(html: str) -> str:
    """tabulate's, with a class in the place of styles."""
    return html.replace(' style="text-align: right;"', ' class="figure"')


# --- figures --------------------------------------------------------------------------------------------------------


def _tiles(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader looks for first: (name, figure)."""
    tiles = [
        (f"{part} speed-up", "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**document["speedup"][part]))
        for part in ("encoder", "total")
    ]
    for key, share in document["retention"].items():
        tiles.append((f"{label_of(key, document['max_detections'])} kept", describe_interval(share)))
    for key, share in document.get("agreement", {}).get("expedited", {}).items():
        tiles.append((f"agreement, {label_of(key, document['max_detections'])}", describe_interval(share)))
    return tiles


def _by_size(material: Material) -> list[dict[str, Any]]:
    """A row for each task and each size of its objects: both models' AP, and what is kept with its interval."""
    limit = material.document["max_detections"]
    pairs = [
        (first, second)
        for first, second in zip(*material.evaluators)
        if isinstance(first, InstanceEvaluator) and isinstance(second, InstanceEvaluator)
    ]
    rows = []
    for first, second in pairs:
        weights = draw_samples(len(first.image_ids), SAMPLES)
        for task in first.matches:
            for (low, high), matches in first.matches_of_size.items():
                if not matches.get(task):
                    continue
                figures = [
                    average_precision(evaluator.matches_of_size[low, high][task], weights)
                    for evaluator in (first, second)
                ]
                rows.append(
                    {
                        "task": label_of(f"{task}.AP", limit),
                        "size": f"under {high:g}"
                        if low == 0
                        else f"over {low:g}"
                        if high >= 1e5
                        else f"{low:g} to {high:g}",
                        "objects": sum(int(category.objects.sum()) for category in matches[task]),
                        "first": float(figures[0][0]),
                        "other": float(figures[1][0]),
                        "kept": _format_share(*figures),
                        "loses": _is_loss(*figures),
                    }
                )
    return rows


def _by_class(material: Material) -> list[dict[str, Any]]:
    """Of each figure that is known by class: its name, and a row for each class that has it, largest loss first."""
    models = material.comparison.models
    first, second = models["unmodified"], models["expedited"]
    tables = []
    for key, classes in first.classes.items():
        rows: list[dict[str, Any]] = []
        for name, samples in classes.items():
            second_samples = second.classes.get(key, {}).get(name)
            if second_samples is None or np.isnan(samples[0]):
                continue
            difference = difference_of_samples(samples, second_samples)
            rows.append(
                {
                    "name": name,
                    "first": float(samples[0]),
                    "other": float(second_samples[0]),
                    "points": difference.points,
                    "difference": f"{_rounded(difference.points):+.1f}"
                    f"{_format_interval(difference.low, difference.high, '+.1f')}",
                    "kept": _format_share(samples, second_samples),
                    "loses": difference.low < difference.high < 0,
                }
            )
        if rows:
            rows.sort(key=lambda row: float(row["points"]))
            tables.append({"label": label_of(key, material.document["max_detections"]), "rows": rows})
    return tables


def _format_share(first: np.ndarray, second: np.ndarray) -> str:
    share = ratio_of_samples(first, second)
    if np.isnan(share.ratio):
        return "-"
    return f"{100 * share.ratio:.1f} %{_format_interval(100 * share.low, 100 * share.high, '.1f')}"


def _is_loss(first: np.ndarray, second: np.ndarray) -> bool:
    difference = difference_of_samples(first, second)
    return difference.low < difference.high < 0  # samples that are all the same say nothing


def _format_interval(low: float, high: float, form: str) -> str:
    if np.isnan(low) or np.isnan(high):
        return ""
    return f" ({_rounded(low):{form}} to {_rounded(high):{form}})"


def _rounded(value: float) -> float:
    return round(value, 1) + 0.0  # no -0.0


# --- what is lost ---------------------------------------------------------------------------------------------------


def _section(task: Task, losses: Losses, cards: list[dict[str, Any]]) -> dict[str, Any]:
    total = losses.total
    labelled = losses.objects is not None
    classes = [
        {
            "name": task.class_name(number),
            "counts": counts[:, 0].tolist(),
            "right_lost": int(counts[LOST, 1]),
            "right_new": int(counts[NEW, 2]),
        }
        for number, counts in losses.counts.items()
    ]
    classes.sort(key=lambda row: (-(sum(row["counts"]) - row["counts"][KEPT]), row["name"]))
    return {
        "name": task.name,
        "labelled": labelled,
        "objects": losses.objects,
        "first": losses.first,
        "other": losses.second,
        "rows": [
            {
                "kind": kind,
                "count": int(total[i, 0]),
                "before": int(total[i, 1]) if labelled and i in OF_FIRST else None,
                "after": int(total[i, 2]) if labelled and i in OF_SECOND else None,
            }
            for i, kind in enumerate(KINDS)
        ],
        "sums": {
            "unmodified": (losses.first, [(KINDS[i], int(total[i, 0])) for i in OF_FIRST]),
            "expedited": (losses.second, [(KINDS[i], int(total[i, 0])) for i in OF_SECOND]),
        },
        "faint": losses.faint,
        "scored": task.name == "instances",
        "classes": classes,
        "cards": cards,
        "images": len(losses.changed),
        "unchanged": sum(not count for count in losses.changed.values()),
    }


def _card(
    task: Task, record: dict[str, Any], folder: Path, stem: str, read: Callable[[dict[str, Any]], np.ndarray]
) -> dict[str, Any]:
    """Draw an image's pictures, and tell its changes."""
    image = task.examine(record["image_id"])
    pixels = read(record)
    size = scaled_size(pixels.shape[:2])
    picture = scale(pixels, size)
    del pixels
    pictures = {"image": picture}
    shapes = {"truth": image.truth and image.truth.objects, "unmodified": image.first, "expedited": image.second}
    for key, marks in marks_of(image, task.class_name).items():
        detections = shapes[key]
        assert detections is not None
        pictures[key] = draw_shapes(picture, detections, marks)
    counts = {"truth": image.truth and len(image.truth.crowd), "unmodified": len(image.first.classes)}
    counts["expedited"] = len(image.second.classes)
    panels = []
    for key, drawn in pictures.items():
        file = f"{stem}_{key}.jpg"
        save_picture(drawn, folder / file)
        count = counts.get(key)
        panels.append({"title": key if count is None else f"{key}: {count}", "file": file})
    changes = list(_changes(task, image))
    kinds = {kind: sum(change["kind"] == kind for change in changes) for kind in KINDS[1:]}
    return {
        "id": record["image_id"],
        "name": printable(os.path.basename(record["file_name"])),
        "panels": panels,
        "width": size[1],
        "height": size[0],
        "strip": size[1] > 2.5 * size[0],
        "changes": changes,
        "kinds": {kind: count for kind, count in kinds.items() if count},
        "kept": int((image.changes.first == KEPT).sum()),
        "classes": sorted({name for change in changes for name in change["classes"]}),
        "labelled": image.right is not None,
    }


def _changes(task: Task, image: Examined) -> Iterator[dict[str, Any]]:
    """Of each detection that is not kept, a pair once: kind, classes, scores and whether it was and is right."""
    first, second, changes = image.first, image.second, image.changes
    verdicts = image.right or (None, None)
    scored = task.name == "instances"

    def describe_detection(detections: Any, number: int, verdict: np.ndarray | None) -> dict[str, str]:
        words = {RIGHT: "right", IGNORED: "not judged"}
        return {
            "name": task.class_name(int(detections.classes[number])),
            "score": f"{detections.scores[number]:.2f}" if scored else "",
            "verdict": "" if verdict is None else words.get(int(verdict[number]), "wrong"),
        }

    rows: list[tuple[int, dict[str, str] | None, dict[str, str] | None]] = []
    for i, kind in enumerate(changes.first):
        if kind != KEPT:
            partner = changes.partner[i]
            after = None if partner < 0 else describe_detection(second, int(partner), verdicts[1])
            rows.append((int(kind), describe_detection(first, i, verdicts[0]), after))
    rows += [
        (int(kind), None, describe_detection(second, i, verdicts[1]))
        for i, kind in enumerate(changes.second)
        if kind in (DUPLICATE, NEW)
    ]
    for kind, before, after in sorted(rows, key=lambda row: ORDER.index(KINDS[row[0]])):
        names = list(dict.fromkeys(detection["name"] for detection in (before, after) if detection))
        yield {"kind": KINDS[kind], "classes": names, "before": before, "after": after}


# --- tokens ---------------------------------------------------------------------------------------------------------


def _tokens(material: Material, record: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    tokens = material.tokens(record)
    if tokens is None:
        return None
    drawn = draw_tokens(material.read(record), tokens)
    save_picture(drawn, folder / "tokens.jpg")
    start, stop = tokens.blocks
    blocks = f"block {start}" if start == stop else f"blocks {start} to {stop}"
    if tokens.labels is not None:
        caption = f"each cell with thin borders is one of the {tokens.running} tokens that {blocks} run on"
        if tokens.merged:
            caption = f"each cell with thin borders is one of the {tokens.running} tokens that {blocks} leave, merged"
    elif tokens.selected is not None:
        caption = f"the bright ones are the {tokens.running} tokens that block {start} runs on"
        if tokens.window:  # whose attention runs on all
            caption = f"the bright ones are the {tokens.running} tokens that the MLP of block {start} runs on"
    elif tokens.running == 0:
        caption = f"{blocks} are left out"
    else:
        caption = "the reducer does not tell which tokens run"
    window = f"; orange lines are windows of {tokens.window} x {tokens.window} tokens" if tokens.window else ""
    return {
        "file": "tokens.jpg",
        "name": printable(os.path.basename(record["file_name"])),
        "what": f"{caption}, of {tokens.full[0]} x {tokens.full[1]}{window}",
        "width": drawn.shape[1],
        "height": drawn.shape[0],
    }
