"""
What combines: fast attention, bfloat16, int8, torch.compile, a plan and batches, on an encoder with random weights.

    python -m benchmarks.stacking --model vitdet_b 'plan.reducer.grid=[7,7]' plan.keys=2
    python -m benchmarks.stacking --model swin_t --size 640 --batches 1 8

For what combinations cost in AP, on a trained model: train_net.py --waterfall.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks.encoder import MODELS, load_encoder, machine, save
from hourglass import InputError
from hourglass.checks import check_count
from hourglass.encoders import find_encoder
from hourglass.evaluation.report import spread
from hourglass.evaluation.resampling import ratio_of_medians
from hourglass.evaluation.timing import Clock
from hourglass.files import check_folder
from hourglass.launch import one_line
from hourglass.waterfall import UNMODIFIED, Step, Trial, attempt, steps


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=MODELS, default="vitdet_b", help="model whose encoder and plan are timed (default: vitdet_b)"
    )
    parser.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the square image")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="N", help="images in a batch")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each row (default: 3)")
    parser.add_argument("--output", default="output/benchmarks", metavar="FOLDER", help="folder of table and JSON")
    parser.add_argument("overrides", nargs="*", metavar="plan.key=value", help="overrides of the model's plan")
    return parser.parse_intermixed_args(arguments)


def measure(rows: list[Step], trials: list[Trial], image: Tensor, device: str, repeats: int) -> dict[str, np.ndarray]:
    """Name of a row that can run here -> (repeats,) milliseconds of its encoder, in turn, after one run for warm-up."""
    clock = Clock(device)
    able = [(row, find_encoder(trial.view)[1]) for row, trial in zip(rows, trials) if not trial.problem]
    times: dict[str, list[float]] = {row.name: [] for row, _ in able}
    with torch.no_grad():
        for i in tqdm(range(-1, repeats), desc=f"timing batches of {len(image)}", unit="round"):
            for row, encoder in able if i % 2 else reversed(able):
                with torch.autocast(device, row.dtype, enabled=row.dtype != torch.float32):
                    clock.synchronize()
                    start = clock.mark()
                    encoder(image)
                    stop = clock.mark()
                    clock.synchronize()
                if i >= 0:
                    times[row.name].append(clock.between(start, stop))
    return {name: np.array(values) for name, values in times.items()}


def to_document(
    rows: list[Step], trials: list[Trial], times: dict[int, dict[str, np.ndarray]], **about: Any
) -> dict[str, Any]:
    """
    What was measured, for programs.

    Args:
        rows, trials: of the same length.
        times: images in a batch -> what :func:`measure` gives.
        about: what was run, as plain values.
    """
    document = []
    for row, trial in zip(rows, trials):
        batches = {}
        for images, of_batch in times.items():
            if row.name in of_batch:
                batches[str(images)] = {
                    "latency_ms": spread(of_batch[row.name]),
                    "images_per_second": 1000 * images / float(np.median(of_batch[row.name])),
                    "speedup": ratio_of_medians(of_batch[UNMODIFIED], of_batch[row.name])._asdict(),
                }
        document.append({"name": row.name, "problem": trial.problem or None, "batches": batches})
    return {**about, "rows": document}


def to_table(document: dict[str, Any]) -> str:
    headers, lines = ["encoder"], []
    for images in document["batches"]:
        of_batch = "" if images == 1 else f", batches of {images}"
        headers += [f"ms an image{of_batch}", "times as fast"]
    for row in document["rows"]:
        cells = [row["name"]]
        for images in document["batches"]:
            batch = row["batches"].get(str(images))
            if batch is None:
                cells += [f"cannot run here: {row['problem']}", ""]
            else:
                ms = 1000 / batch["images_per_second"]
                cells += [
                    f"{ms:.{0 if ms > 100 else 1}f}",
                    "{ratio:.2f} ({low:.2f}-{high:.2f})".format(**batch["speedup"]),
                ]
        lines.append(cells)
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=alignment)


def main(args: argparse.Namespace) -> None:
    for name, counts in (("size", [args.size]), ("batches", args.batches), ("repeats", [args.repeats])):
        for count in counts:
            check_count(f"--{name}", count, 1)
    if len(args.batches) != len(set(args.batches)):
        raise InputError(f"--batches must differ, got {' '.join(map(str, args.batches))}")
    check_folder("--output", args.output)
    warnings.filterwarnings("ignore", category=FutureWarning)
    encoder, plan = load_encoder(args)
    rows = steps(plan)
    images = {n: torch.randn(n, 3, args.size, args.size, device=args.device) for n in args.batches}
    trials = attempt(rows, encoder, list(images.values()), args.device)
    times = {n: measure(rows, trials, image, args.device, args.repeats) for n, image in images.items()}
    settings = {key: getattr(args, key) for key in ("model", "size", "batches", "device", "repeats")}
    document = to_document(rows, trials, times, **settings, **machine(args.device), plan=plan.describe())
    table = to_table(document)
    about = document.get("gpu") or f"{document['cpu']}, {document['threads']} threads"
    print(f"\n{args.model}, {args.size} x {args.size} pixels, {args.device} ({about})\nplan: {plan!r}\n\n{table}\n")
    for row in document["rows"]:
        if row["problem"]:
            print(f"warning: {row['name']} cannot run here: {row['problem']}", file=sys.stderr)
    name = f"{args.model}_{args.size}_{args.device}_stacking"
    save(Path(args.output), name, document, table)
    print(f"written to {Path(args.output) / name}.json and .md")


if __name__ == "__main__":
    with one_line():
        main(parse())
