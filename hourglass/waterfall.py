"""What makes a model faster, part by part and all together, in one table."""

import copy
import csv
import io
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from hourglass.contexts import evaluating
from hourglass.encoders import Plan, expedite, find_encoder
from hourglass.encoders.calibration import describe_encoder, sample_weights
from hourglass.encoders.sharing import replaced
from hourglass.errors import InputError, reason
from hourglass.evaluation.compare import Comparison, Measurement, Subject
from hourglass.evaluation.environment import describe_environment
from hourglass.evaluation.figures import label_of, reported
from hourglass.evaluation.report import (
    describe,
    describe_interval,
    describe_machine,
    spread,
    tabulate_rows,
    without_nan,
    write_document,
)
from hourglass.evaluation.resampling import interval_of_samples

SCHEMA = 1
UNMODIFIED = "unmodified"
PARTS = ("encoder", "total")
#: Images that are run on unless told otherwise: every row runs on all of them.
IMAGES = 100
# Of a reason that is given in the table.
LONGEST = 160


class Step(NamedTuple):
    """
    A row of the table.

    Attributes:
        name: of the row.
        plan: that the encoder runs under.
        planned: whether it is the user's, which leaves tokens out.
        dtype: by autocast, if not float32.
        compiled: whether the encoder is, by ``torch.compile``.
        quantized: whether the encoder's linear layers multiply in int8, see :func:`quantize`.
    """

    name: str
    plan: Plan
    planned: bool = False
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    quantized: bool = False

    @property
    def precision(self) -> str:
        """What is multiplied in, as ``waterfall.json`` has it."""
        return "int8" if self.quantized else str(self.dtype).removeprefix("torch.")

    def view(self, model: nn.Module) -> nn.Module:
        """The model of this row, a view of the same weights, which stay as they are."""
        view = _in_int8_under(self.plan, model) if self.quantized else expedite(model, self.plan)
        if self.compiled:
            encoder = find_encoder(view)[1]
            # What is called from outside stays as it is, for hooks that tell the time.
            vars(encoder)["forward"] = torch.compile(encoder.forward)
        return view

    def subject(self, view: nn.Module, evaluator: Any) -> Subject:
        return Subject(view, find_encoder(view)[1], evaluator, self.dtype, self.compiled, counted=False)


def quantize(model: nn.Module) -> nn.Module:
    """
    A view of a model whose encoder's linear layers multiply in int8, by torch's dynamic quantisation: weights are
    rounded once, with a scale for each output channel, and tokens as they come, with one scale for all. The model's own
    layers and weights stay as they are.

    Args:
        model: on a CPU, with an encoder that :func:`hourglass.expedite` takes.

    Returns:
        the view; the rounded weights are its own.

    Raises:
        InputError: for a model that is not on a CPU.
        Exception: what a torch without dynamic quantisation raises.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise InputError(f"the model must be on a CPU, as torch's int8 layers are, got {device}")
    layers = [module for module in find_encoder(model)[1].modules() if type(module) is nn.Linear]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torchao will have it
        return replaced(model, {layer: _in_int8(layer) for layer in layers})


def _in_int8(layer: nn.Linear) -> nn.Module:
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    # It copies what it is given, this layer alone, and leaves the layer as it is.
    return quantize_dynamic(nn.Sequential(layer).eval(), {nn.Linear: per_channel_dynamic_qconfig})[0]


def _in_int8_under(plan: Plan, model: nn.Module) -> nn.Module:
    """A model in int8, expedited. A calibration is checked against the weights before they were rounded."""
    rounded = quantize(model)
    if plan.calibration is not None:
        encoder, rounded_encoder = find_encoder(model)[1], find_encoder(rounded)[1]
        plan.calibration.check_encoder(encoder)
        plan.calibration.check_weights(encoder)
        calibration = copy.copy(plan.calibration)
        calibration.encoder, calibration.weights = describe_encoder(rounded_encoder), sample_weights(rounded_encoder)
        plan = plan.calibrated(calibration)
    return expedite(rounded, plan)


def steps(plan: Plan) -> list[Step]:
    """
    The rows: each part alone, then one after another up to all of them together. bfloat16 and int8 exclude each other.

    Args:
        plan: the user's; one that changes nothing but attention has no rows of its own.
    """
    fast, half = Plan(attention="fast"), torch.bfloat16
    rows = [
        Step(UNMODIFIED, Plan()),
        Step("fast attention", fast),
        Step("bfloat16", Plan(), dtype=half),
        Step("int8", Plan(), quantized=True),
        Step("compiled", Plan(), compiled=True),
        Step("plan", plan, planned=True),
        Step("fast attention, bfloat16", fast, dtype=half),
        Step("fast attention, bfloat16, compiled", fast, dtype=half, compiled=True),
        Step("plan, bfloat16", plan, planned=True, dtype=half),
        Step("plan, int8", plan, planned=True, quantized=True),
        Step("all: plan, bfloat16, compiled", plan, planned=True, dtype=half, compiled=True),
    ]
    return rows if plan.reducer is not None or plan.keys > 1 else [row for row in rows if not row.planned]


class Trial(NamedTuple):
    """
    What comes of a row before anything is timed.

    Attributes:
        view: the model of the row; None where it cannot be made here.
        seconds: that the first runs took, compiling among them.
        problem: why it cannot run here, in a line; empty where it can.
    """

    view: nn.Module | None
    seconds: float
    problem: str = ""


def attempt(rows: Sequence[Step], model: nn.Module, batches: Sequence[list[dict]], device: str) -> list[Trial]:
    """
    Make each row's view of a model, and run it on each of a few batches.

    Raises:
        InputError: for a plan that the model cannot follow, and images that it does not take.
        Exception: what the unmodified model raises.
    """
    trials = []
    bar = tqdm(rows, desc="first runs, and compiling", unit="row", disable=not comm.is_main_process())
    for row in bar:
        bar.set_postfix_str(row.name)
        start, view, problem = time.perf_counter(), None, ""
        try:
            view = row.view(model)
            with evaluating(view), torch.no_grad():
                with torch.autocast(device, row.dtype, enabled=row.dtype != torch.float32):
                    for inputs in batches:
                        view(inputs)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler, or a type that a device does not have, may raise
            # The plan and the images are the user's: what is wrong with them is wrong in all rows.
            if row.name == UNMODIFIED or isinstance(error, InputError) and not row.quantized:
                raise
            problem = _in_words(error)
        trials.append(Trial(view, time.perf_counter() - start, problem))
    return trials


def _in_words(error: Exception) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    # Of an error in torch's compiler the first line only says where it was raised.
    line = next((line for line in lines if not line.endswith(":")), reason(error))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def to_json(
    rows: Sequence[Step], trials: Sequence[Trial], comparison: Comparison, plan: Plan, **about: Any
) -> dict[str, Any]:
    """
    Args:
        rows, trials: of the same length.
        comparison: of the rows that can run here, by their names.
        plan: the user's.
        about: "dataset" and "device".

    Returns:
        the content of ``waterfall.json``: as ``comparison.json`` has it (:func:`~hourglass.evaluation.report.to_json`),
        of each row.
    """
    first = next(iter(comparison.models.values()))
    document = {
        "schema": SCHEMA,
        "dataset": about["dataset"],
        "images": int(first.runs["images"].sum()),
        "batch_size": first.batch_size,
        "max_detections": comparison.max_detections,
        "dtype": "float32",
        "environment": describe_environment(about["device"]),
        "plan": plan.describe(),
        "rows": [_row(row, trial, comparison) for row, trial in zip(rows, trials)],
        "warnings": comparison.warnings(),
    }
    return without_nan(document)


def _row(row: Step, trial: Trial, comparison: Comparison) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": row.name,
        "attention": row.plan.attention,
        "plan": row.planned,
        "dtype": row.precision,
        "compiled": row.compiled,
        "problem": trial.problem or None,
        "first_run_s": trial.seconds,
    }
    if trial.problem:
        return content
    measured: Measurement = comparison.models[row.name]
    content["accuracy"] = {
        figure.key: metrics[figure.metric]
        for task, metrics in measured.accuracy.items()
        for figure in reported(task, metrics)
        if figure.retention
    }
    content["retention"] = {key: share._asdict() for key, share in comparison.retention(row.name).items()}
    if row.name in comparison.agreement:
        figures = comparison.agreement[row.name]
        content["agreement"] = {key: interval_of_samples(samples / 100)._asdict() for key, samples in figures.items()}
    content["latency_ms"] = {part: spread(measured.timed[part]) for part in PARTS}
    content["images_per_second"] = measured.images_per_second
    content["speedup"] = {part: comparison.speedup(row.name, part)._asdict() for part in PARTS}
    content["peak_memory_mb"] = measured.peak_memory_mb
    return content


def to_table(document: dict[str, Any], tablefmt: str = "simple") -> str:
    """
    Args:
        document: from :func:`to_json`.
        tablefmt: of ``tabulate``.

    Returns:
        a row for each of the document's.
    """
    figures = _figures(document)
    batch = "" if document["batch_size"] == 1 else f" of a batch of {document['batch_size']}"
    headers = ["", *(header for kind, key in figures for header in _headers(kind, key, document))]
    headers += [f"encoder{batch}, ms", f"total{batch}, ms (p10-p90)", "images/s", "times as fast", "peak memory, MB"]
    broken = any(row["problem"] for row in document["rows"])
    lines = []
    for row in document["rows"]:
        if row["problem"]:
            lines.append([row["name"], *["-"] * (len(headers) - 1), f"cannot run here: {row['problem']}"])
            continue
        cells = [row["name"]]
        for kind, key in figures:
            if kind == "accuracy":
                value = row["accuracy"].get(key)
                share = row["retention"].get(key, {"ratio": None, "low": None, "high": None})
                cells.append("-" if value is None else f"{value:.1f}")
                cells.append("" if row["name"] == UNMODIFIED else describe_interval(share))
            else:
                share = row.get("agreement", {}).get(key)
                cells.append("" if share is None else describe_interval(share))
        encoder, total = (row["latency_ms"][part] for part in PARTS)
        speedup = row["speedup"]["total"]
        cells += [
            f"{encoder['median']:.1f}",
            "{median:.1f} ({p10:.1f}-{p90:.1f})".format(**total),
            f"{row['images_per_second']:.2f}",
            "" if row["name"] == UNMODIFIED else "{ratio:.2f} ({low:.2f}-{high:.2f})".format(**speedup),
            "-" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}",
        ]
        lines.append([*cells, ""] if broken else cells)
    return tabulate_rows(lines, [*headers, ""] if broken else headers, tablefmt)


def _figures(document: dict[str, Any]) -> list[tuple[str, str]]:
    """("accuracy" or "agreement", "task.metric") of every figure that a row has."""
    return list(
        dict.fromkeys(
            (kind, key) for row in document["rows"] for kind in ("accuracy", "agreement") for key in row.get(kind, {})
        )
    )


def _headers(kind: str, key: str, document: dict[str, Any]) -> list[str]:
    label = label_of(key, document["max_detections"])
    return [label, f"{label} kept"] if kind == "accuracy" else [f"agreement, {label}"]


def to_csv(document: dict[str, Any]) -> str:
    """The text of ``waterfall.csv``: a line for each row, what does not exist empty."""
    lines = [dict(_flat(row)) for row in document["rows"]]
    text = io.StringIO()
    fields = list(dict.fromkeys(field for line in lines for field in line))
    writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def to_text(document: dict[str, Any], tablefmt: str = "simple") -> str:
    """What was measured, the table, and what it was measured on."""
    return "\n\n".join((describe(document), to_table(document, tablefmt), describe_machine(document)))


def write_waterfall(document: dict[str, Any], folder: str | os.PathLike) -> None:
    """Write ``waterfall.json``, ``waterfall.csv`` and ``waterfall.md`` into ``folder``, all of them whole or none."""
    write_document("waterfall", document, to_csv(document), to_text(document, "github"), folder)
