"""A comparison as a table, as JSON and as CSV."""

import csv
import io
import json
import math
import os
from typing import Any

import numpy as np
from tabulate import tabulate

from hourglass.evaluation.compare import Comparison, Measurement
from hourglass.evaluation.environment import describe_environment
from hourglass.evaluation.figures import find_figure, label_of, reported, split_key
from hourglass.evaluation.resampling import interval_of_samples
from hourglass.files import write_together

SCHEMA = 4
# Parts of a run, in its order and at last the whole.
PARTS = ("preprocessing", "encoder", "rest", "total")
CSV_FIELDS = ("model", "figure", "class", "value", "low", "high")


def to_json(comparison: Comparison, **about: Any) -> dict[str, Any]:
    """
    Args:
        comparison: its models named "unmodified", "fast attention", "expedited", "control", "linear control", or some.
        about: "dataset", "device", "dtype" and "plan".

    Returns:
        the content of ``comparison.json``: figures in percent, also by class, and by how many points each class differs
        from the first model's; latencies in ms of a batch of "batch_size" images, retention and efficiency as shares;
        retention, speed-up and differences with 95 % intervals, None where a figure does not exist.
    """
    models = comparison.models
    first = next(iter(models.values()))
    full = [measurement.runs["full"] for measurement in models.values()]
    reduced = next((tokens for tokens in full if tokens.any()), None)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "dataset": about["dataset"],
        "images": int(first.runs["images"].sum()),
        "batch_size": first.batch_size,
        "max_detections": comparison.max_detections,
        "dtype": about["dtype"],
        "environment": describe_environment(about["device"]),
        "plan": about["plan"],
        "models": {name: _model(measurement, reduced) for name, measurement in models.items()},
    }
    if "unmodified" in models and "expedited" in models:
        document.update(_ratios_to_first(comparison, "expedited"))
    if "unmodified" in models and "fast attention" in models:
        document["fast_attention"] = _ratios_to_first(comparison, "fast attention")
    if "expedited" in models:
        document["efficiency"] = comparison.efficiency("expedited")
    for name in ("control", "linear control"):
        if "unmodified" in models and name in models:
            document[f"{name.replace(' ', '_')}_retention"] = _retention(comparison, name)
    if comparison.agreement:
        document["agreement"] = {
            name: {key: interval_of_samples(samples / 100)._asdict() for key, samples in figures.items()}
            for name, figures in comparison.agreement.items()
        }
    document["difference_by_class"] = {
        name: {
            key: {class_name: difference._asdict() for class_name, difference in classes.items()}
            for key, classes in comparison.difference_by_class(name).items()
        }
        for name in list(models)[1:]
    }
    document["warnings"] = comparison.warnings()
    return without_nan(document)


def _ratios_to_first(comparison: Comparison, name: str) -> dict[str, Any]:
    speedup = {part: comparison.speedup(name, part)._asdict() for part in ("encoder", "total")}
    return {"speedup": speedup, "retention": _retention(comparison, name)}


def _retention(comparison: Comparison, name: str) -> dict[str, dict[str, float]]:
    return {figure: share._asdict() for figure, share in comparison.retention(name).items()}


def _model(measurement: Measurement, reduced: np.ndarray | None) -> dict[str, Any]:
    """``reduced``: the tokens of an image, batch by batch, that a plan reduces in this or another of the models."""
    runs, timed = measurement.runs, measurement.timed
    times = {**timed, "rest": timed["total"] - timed["preprocessing"] - timed["encoder"]}
    full = runs["size"] if reduced is None else reduced
    middle = runs["middle"] if runs["full"].any() else full
    return {
        "accuracy": {
            task: {figure.metric: metrics[figure.metric] for figure in reported(task, metrics)}
            for task, metrics in measurement.accuracy.items()
        },
        "by_class": {
            key: {name: float(samples[0]) for name, samples in classes.items()}
            for key, classes in measurement.classes.items()
        },
        "latency_ms": {part: spread(times[part]) for part in PARTS},
        "images_per_second": measurement.images_per_second,
        "encoder_gflops": measurement.encoder_gflops,
        "tokens": {"full": float(np.median(full)), "middle": float(np.median(middle))},
        "peak_memory_mb": measurement.peak_memory_mb,
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def without_nan(value: Any) -> Any:
    """The same with None in the place of nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
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
    against = _ratios_by_model(document)
    rows = []

    def row(label: str, cells: list[str], ratios: dict[str, str] | None = None) -> None:
        rows.append([label, *cells, *((ratios or {}).get(name, "") for name in against)])

    for key in _figure_keys(models):
        task, metric = split_key(key)
        figure = find_figure(task, metric)
        if figure is None or figure.label is None:
            continue
        cells = [_number(model["accuracy"].get(task, {}).get(metric), 1) for model in models.values()]
        shares = {name: ratios["retention"] for name, ratios in against.items()}
        ratios = {name: describe_interval(share[key]) for name, share in shares.items() if key in share}
        row(label_of(key, document["max_detections"]), cells, ratios)
    agreement = document.get("agreement", {})
    for key in dict.fromkeys(key for figures in agreement.values() for key in figures):
        cells = [describe_interval(agreement[name][key]) if name in agreement else "" for name in models]
        row(f"agreement, {label_of(key)}", cells)
    speedups = {name: ratios["speedup"] for name, ratios in against.items() if "speedup" in ratios}
    batch = "" if document["batch_size"] == 1 else f" of a batch of {document['batch_size']}"
    for part in PARTS:
        cells = [_latency(model["latency_ms"][part]) for model in models.values()]
        row(
            f"{part} latency{batch}, ms (p10-p90)",
            cells,
            {
                name: "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**speedup[part])
                for name, speedup in speedups.items()
                if part in speedup
            },
        )
    row("images/s", [_number(model["images_per_second"], 2) for model in models.values()])
    gflops = {name: model["encoder_gflops"] for name, model in models.items()}
    ratios = {name: f"{gflops[name] / gflops['unmodified']:.2f}x" for name in speedups}
    row("encoder GFLOPs", [_number(value, 2) for value in gflops.values()], ratios)
    tokens = [f"{model['tokens']['middle']:.0f} of {model['tokens']['full']:.0f}" for model in models.values()]
    row("tokens in the middle", tokens)
    row(f"peak memory{batch}, MB", [_number(model["peak_memory_mb"], 0) for model in models.values()])
    if "efficiency" in document:
        row("efficiency", [_percent(document["efficiency"]) if name == "expedited" else "" for name in models])
    return tabulate_rows(rows, ["", *models, *(f"{name} / unmodified" for name in against)], tablefmt)


def to_class_tables(document: dict[str, Any], tablefmt: str = "simple") -> str:
    """
    Args:
        document: from :func:`to_json`.
        tablefmt: of ``tabulate``.

    Returns:
        for each figure that is known by class a table with a row for each class that has it: the models' figures, and
        by how many points the expedited model's (without one, the last model's) differs from the first's, largest loss
        first. Of one model alone, the lowest figure first.
    """
    models = document["models"]
    compared = "expedited" if "expedited" in document["difference_by_class"] else list(models)[-1]
    tables = []
    for key in _figure_keys(models):
        by_class = {name: model["by_class"][key] for name, model in models.items() if key in model["by_class"]}
        if not by_class:
            continue
        differences = document["difference_by_class"].get(compared, {}).get(key)
        classes = dict.fromkeys(class_name for model in by_class.values() for class_name in model)
        rows = []
        for class_name in classes:
            cells = [_number(model.get(class_name), 1) for model in by_class.values()]
            if set(cells) == {"-"}:
                continue
            if differences is None:
                rank = next(iter(by_class.values()))[class_name]
            else:
                difference = differences.get(class_name, dict.fromkeys(("points", "low", "high")))
                rank = difference["points"]
                cells.append(_points(difference))
            rows.append((math.inf if rank is None else rank, [class_name, *cells]))
        headers = [f"{label_of(key, document['max_detections'])} by class", *by_class]
        if differences is not None:
            headers.append(f"{compared} - {next(iter(models))}")
        tables.append(tabulate_rows([cells for _, cells in sorted(rows, key=lambda row: row[0])], headers, tablefmt))
    return "\n\n".join(tables)


def to_csv(document: dict[str, Any]) -> str:
    """
    The figures for spreadsheets, a row for each figure of each model, in the columns :data:`CSV_FIELDS`.

    Args:
        document: from :func:`to_json`.

    Returns:
        the text of ``comparison.csv``. "figure" is where the document has it, such as "accuracy.bbox.AP",
        "latency_ms.encoder.median", "speedup.encoder", "retention.bbox.AP" or "agreement.bbox.AP", the last three to
        the first model; "class" is empty for figures of all classes, those of a class are "accuracy.bbox.AP" and
        "difference.bbox.AP"; "low" and "high" are the ends of the 95 % interval. What does not exist is empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_FIELDS)

    def add(model: str, figure: str, value: Any, interval: dict[str, Any] | None = None, name: str = "") -> None:
        ends = interval or {"low": None, "high": None}
        writer.writerow([model, figure, name, value, ends["low"], ends["high"]])

    for name, model in document["models"].items():
        for task, metrics in model["accuracy"].items():
            for metric, value in metrics.items():
                add(name, f"accuracy.{task}.{metric}", value)
        for key, classes in model["by_class"].items():
            for class_name, value in classes.items():
                add(name, f"accuracy.{key}", value, name=class_name)
        for part, times in model["latency_ms"].items():
            for statistic, value in times.items():
                add(name, f"latency_ms.{part}.{statistic}", value)
        for figure in ("images_per_second", "encoder_gflops", "peak_memory_mb"):
            add(name, figure, model[figure])
        for part, count in model["tokens"].items():
            add(name, f"tokens.{part}", count)
        against = _ratios_by_model(document).get(name, {})
        for key, share in against.get("retention", {}).items():
            add(name, f"retention.{key}", share["ratio"], share)
        for part, speedup in against.get("speedup", {}).items():
            add(name, f"speedup.{part}", speedup["ratio"], speedup)
        for key, share in document.get("agreement", {}).get(name, {}).items():
            add(name, f"agreement.{key}", share["ratio"], share)
        if name == "expedited" and "efficiency" in document:
            add(name, "efficiency", document["efficiency"])
        for key, classes in document["difference_by_class"].get(name, {}).items():
            for class_name, difference in classes.items():
                add(name, f"difference.{key}", difference["points"], difference, class_name)
    return text.getvalue()


def _figure_keys(models: dict[str, Any]) -> list[str]:
    """ "task.metric" of every figure that a model has, in the models' order."""
    return list(
        dict.fromkeys(
            f"{task}.{metric}"
            for model in models.values()
            for task, metrics in model["accuracy"].items()
            for metric in metrics
        )
    )


def _ratios_by_model(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Model -> its retention and speed-up against the unmodified one, as far as they are known."""
    against = {
        "fast attention": document.get("fast_attention"),
        "expedited": document if "speedup" in document else None,
    }
    for name in ("control", "linear control"):
        if (key := f"{name.replace(' ', '_')}_retention") in document:
            against[name] = {"retention": document[key]}
    return {name: ratios for name, ratios in against.items() if ratios is not None}


def tabulate_rows(rows: list[list[str]], headers: list[str], tablefmt: str) -> str:
    """A table of text, its first column to the left and the others to the right."""
    return tabulate(
        rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )


def describe(document: dict[str, Any]) -> str:
    """What was measured, in a line."""
    plan, environment = document["plan"], document["environment"]
    reducer = plan["reducer"]
    if reducer is None:
        planned = "no reducer"
    else:
        arguments = ", ".join(f"{name}={value}" for name, value in reducer.items() if name != "name")
        planned = (
            f"{reducer['name']}({arguments}) before block {plan['start']} to "
            f"{'the end' if plan['stop'] is None else 'block ' + str(plan['stop'])}, scope {plan['scope']}"
            f"{', proportional attention' if plan['proportional'] else ''}, {plan['attention']} attention"
        )
    if "keys" in plan:
        planned += f", keys pooled {plan['keys']} x {plan['keys']}"
    if "calibration" in plan:
        calibration = plan["calibration"]
        planned += f", calibrated on {calibration['images']} images of {calibration['about']}"
    device = f"{environment['device']} ({environment['threads']} threads)"
    images = f"{document['images']} images" + (f" in batches of {size}" if (size := document["batch_size"]) > 1 else "")
    return f"{document['dataset']}, {images}, {device}, {document['dtype']}; plan: {planned}"


def describe_machine(document: dict[str, Any]) -> str:
    """What it was measured on, in a line."""
    environment = document["environment"]
    versions = environment["versions"]
    device = environment["cpu"]
    if environment["gpu"] is not None:
        driver = "" if environment["driver"] is None else f", driver {environment['driver']}"
        device = f"{environment['gpu']} (CUDA {environment['cuda']}{driver}), {device}"
    names = {"torch": "torch", "detectron2": "Detectron2", "hourglass": "hourglass", "python": "Python"}
    return f"{device}; {', '.join(f'{name} {versions[key]}' for key, name in names.items())}; {environment['system']}"


def to_text(document: dict[str, Any], tablefmt: str = "simple", by_class: bool = False) -> str:
    """What was measured, the table, what it was measured on and, if asked for, the tables by class."""
    parts = [describe(document), to_table(document, tablefmt), describe_machine(document)]
    if by_class:
        parts.append(to_class_tables(document, tablefmt))
    return "\n\n".join(part for part in parts if part)


def write_report(document: dict[str, Any], folder: str | os.PathLike, by_class: bool = False) -> None:
    """
    Write ``comparison.json``, ``comparison.csv`` and ``comparison.md`` into ``folder``, all of them whole or none.

    Args:
        document: from :func:`to_json`.
        folder: is made where it is missing.
        by_class: also tables by class in ``comparison.md``.
    """
    write_document("comparison", document, to_csv(document), to_text(document, "github", by_class), folder)


def write_document(name: str, document: dict[str, Any], table: str, text: str, folder: str | os.PathLike) -> None:
    """Write a document as JSON, its CSV and, with its warnings, its Markdown, all of them whole or none."""
    warnings = "".join(f"\nWarning: {line}\n" for line in document["warnings"])
    write_together(
        folder,
        {
            f"{name}.json": json.dumps(document, indent=2, allow_nan=False) + "\n",
            f"{name}.csv": table,
            f"{name}.md": f"{text}\n{warnings}",
        },
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def describe_interval(share: dict[str, float | None]) -> str:
    """An `Interval` of shares in percent, without the interval where it has none."""
    ratio, low, high = (share[key] for key in ("ratio", "low", "high"))
    if ratio is None or low is None or high is None:
        return _percent(ratio)
    return f"{100 * ratio:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def _points(difference: dict[str, float | None]) -> str:
    points, low, high = (difference[key] for key in ("points", "low", "high"))
    if points is None:
        return "-"
    if low is None or high is None:
        return f"{points:+.1f}"
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"


def _latency(spread: dict[str, float]) -> str:
    return "{median:.1f} ({p10:.1f}-{p90:.1f})".format(**spread)
