"""A comparison as a table and as JSON."""

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
import torchvision
from tabulate import tabulate

from hourglass.evaluation.compare import Comparison, Measurement
from hourglass.files import write_whole
from hourglass.version import __version__

SCHEMA = 2
TASKS = {"bbox": "box", "segm": "mask"}
# What is reported of a task, and its label in the table: None is for the document alone. Of other tasks every AP is.
METRICS = {
    "panoptic_seg": {
        f"{metric}{suffix}": f"{metric}{label}"
        for suffix, label in (("", ""), ("_th", " things"), ("_st", " stuff"))
        for metric in ("PQ", "SQ", "RQ")
    },
    "sem_seg": {"mIoU": "mIoU", "fwIoU": None, "mACC": None, "pACC": None},
}


def to_json(comparison: Comparison, **about: Any) -> dict[str, Any]:
    """
    Args:
        comparison: its models named "unmodified", "fast attention", "expedited" and "control", or some of them.
        about: "dataset", "device", "dtype" and "plan".

    Returns:
        the content of ``comparison.json``: latencies in ms, retention and efficiency as shares, retention and speed-up
        with 95 % intervals, None where a figure does not exist.
    """
    models = comparison.models
    first = next(iter(models.values()))
    full = [measurement.runs["full"] for measurement in models.values()]
    reduced = next((tokens for tokens in full if tokens.any()), None)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "dataset": about["dataset"],
        "images": len(first.runs["total"]),
        "max_detections": comparison.max_detections,
        "device": about["device"],
        "dtype": about["dtype"],
        "threads": torch.get_num_threads(),
        "versions": {
            "hourglass": __version__,
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "plan": about["plan"],
        "models": {name: _model(measurement, reduced) for name, measurement in models.items()},
    }
    if "unmodified" in models and "expedited" in models:
        document.update(_against_first(comparison, "expedited"))
    if "unmodified" in models and "fast attention" in models:
        document["fast_attention"] = _against_first(comparison, "fast attention")
    if "expedited" in models:
        document["efficiency"] = comparison.efficiency("expedited")
    if "unmodified" in models and "control" in models:
        document["control_retention"] = _retention(comparison, "control")
    return without_nan(document)


def _against_first(comparison: Comparison, name: str) -> dict[str, Any]:
    speedup = {part: comparison.speedup(name, part)._asdict() for part in ("encoder", "total")}
    return {"speedup": speedup, "retention": _retention(comparison, name)}


def _retention(comparison: Comparison, name: str) -> dict[str, dict[str, float]]:
    return {figure: share._asdict() for figure, share in comparison.retention(name).items()}


def _model(measurement: Measurement, reduced: np.ndarray | None) -> dict[str, Any]:
    """``reduced``: the tokens, image by image, that a plan reduces in this or another of the models."""
    runs = measurement.runs
    full = runs["size"] if reduced is None else reduced
    middle = runs["middle"] if runs["full"].any() else full
    return {
        "accuracy": {
            task: {metric: value for metric, value in metrics.items() if _is_reported(task, metric)}
            for task, metrics in measurement.accuracy.items()
        },
        "latency_ms": {part: spread(runs[part]) for part in ("encoder", "total")},
        "encoder_gflops": measurement.encoder_gflops,
        "tokens": {"full": float(np.median(full)), "middle": float(np.median(middle))},
        "peak_memory_mb": measurement.peak_memory_mb,
    }


def _is_reported(task: str, metric: str) -> bool:
    if task in METRICS:
        return metric in METRICS[task]
    return metric.startswith("AP") and "-" not in metric  # not "AP-person"


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def without_nan(value: Any) -> Any:
    """The same with None in the place of nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def to_table(document: dict[str, Any], tablefmt: str = "simple") -> str:
    """
    Args:
        document: from :func:`to_json`.
        tablefmt: of ``tabulate``.

    Returns:
        a row for each figure, a column for each model, and one for each of the others' ratio to the unmodified.
    """
    models = document["models"]
    against = {
        "fast attention": document.get("fast_attention"),
        "expedited": document if "speedup" in document else None,
        "control": {"retention": document["control_retention"]} if "control_retention" in document else None,
    }
    against = {name: ratios for name, ratios in against.items() if ratios is not None}
    rows = []

    def row(label: str, cells: list[str], ratios: dict[str, str] | None = None) -> None:
        rows.append([label, *cells, *((ratios or {}).get(name, "") for name in against)])

    limit = describe_limit(document["max_detections"])
    for task in next(iter(models.values()))["accuracy"]:
        for metric in next(iter(models.values()))["accuracy"][task]:
            label = METRICS[task][metric] if task in METRICS else f"{TASKS.get(task, task)} {metric}{limit}"
            if label is None:
                continue
            key = f"{task}.{metric}"
            cells = [_number(model["accuracy"].get(task, {}).get(metric), 1) for model in models.values()]
            shares = {name: ratios["retention"] for name, ratios in against.items()}
            row(label, cells, {name: describe_interval(share[key]) for name, share in shares.items() if key in share})
    for part in ("encoder", "total"):
        cells = [_latency(model["latency_ms"][part]) for model in models.values()]
        speedups = {name: ratios["speedup"] for name, ratios in against.items() if "speedup" in ratios}
        row(
            f"{part} latency, ms (p10-p90)",
            cells,
            {name: "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**speedup[part]) for name, speedup in speedups.items()},
        )
    gflops = {name: model["encoder_gflops"] for name, model in models.items()}
    ratios = {name: f"{gflops[name] / gflops['unmodified']:.2f}x" for name in speedups}
    row("encoder GFLOPs", [_number(value, 2) for value in gflops.values()], ratios)
    tokens = [f"{model['tokens']['middle']:.0f} of {model['tokens']['full']:.0f}" for model in models.values()]
    row("tokens in the middle", tokens)
    row("peak memory, MB", [_number(model["peak_memory_mb"], 0) for model in models.values()])
    if "efficiency" in document:
        row("efficiency", [_percent(document["efficiency"]) if name == "expedited" else "" for name in models])
    headers = ["", *models, *(f"{name} / unmodified" for name in against)]
    return tabulate(
        rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )


def describe_limit(max_detections: int | None) -> str:
    """What a figure of AP is to say of the limit of detections an image; COCO's own, 100, needs no mention."""
    return "" if max_detections in (None, 100) else f" (maxDets {max_detections})"


def describe(document: dict[str, Any]) -> str:
    """What was measured, in a line."""
    plan = document["plan"]
    reducer = plan["reducer"]
    if reducer is None:
        planned = "no plan"
    else:
        arguments = ", ".join(f"{name}={value}" for name, value in reducer.items() if name != "name")
        planned = (
            f"{reducer['name']}({arguments}) before block {plan['start']} to "
            f"{'the end' if plan['stop'] is None else 'block ' + str(plan['stop'])}, scope {plan['scope']}"
            f"{', proportional attention' if plan['proportional'] else ''}, {plan['attention']} attention"
        )
    return (
        f"{document['dataset']}, {document['images']} images, {document['device']} ({document['threads']} threads), "
        f"{document['dtype']}; plan: {planned}"
    )


def write_report(document: dict[str, Any], folder: str | os.PathLike) -> None:
    """Write ``comparison.json`` and ``comparison.md`` into ``folder``, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "comparison.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    write_whole(folder / "comparison.md", f"{describe(document)}\n\n{to_table(document, 'github')}\n")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def describe_interval(share: dict[str, float | None]) -> str:
    """An `Interval` of shares in percent, without the interval where it has none."""
    if share["low"] is None:
        return _percent(share["ratio"])
    return "{ratio:.1f} % ({low:.1f}-{high:.1f})".format(**{key: 100 * value for key, value in share.items()})


def _latency(spread: dict[str, float]) -> str:
    return "{median:.1f} ({p10:.1f}-{p90:.1f})".format(**spread)
