#!/usr/bin/env python
"""
Time an encoder with random weights against itself on fewer tokens, in one process and in turn.

    python benchmarks/encoder.py --model swin_l --size 1152
    python benchmarks/encoder.py --model vitdet_b plan.stop=11 plan.scope=window 'plan.reducer.grid=[10,10]'
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hourglass  # noqa: E402  (first: it mends Detectron2 0.6)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
from detectron2.config import instantiate  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hourglass import InputError, Plan  # noqa: E402
from hourglass.encoders import find_encoder  # noqa: E402
from hourglass.evaluation.cost import PeakMemory, count_gflops  # noqa: E402
from hourglass.evaluation.report import check_folder, spread, write_whole  # noqa: E402
from hourglass.evaluation.timing import Clock, Stopwatch, ratio_of_medians  # noqa: E402
from hourglass.reduction import Reducer  # noqa: E402
from hourglass.reduction.reducer import check_count  # noqa: E402
from train_net import build, load_config, refuse  # noqa: E402

MODELS = {
    "vitdet_b": "vitdet/mask_rcnn_b.py",
    "vitdet_l": "vitdet/mask_rcnn_l.py",
    "vitdet_h": "vitdet/mask_rcnn_h.py",
    "swin_t": "mask2former/coco_panoptic_swin_t.py",
    "swin_s": "mask2former/coco_panoptic_swin_s.py",
    "swin_b": "mask2former/coco_panoptic_swin_b.py",
    "swin_l": "mask2former/coco_panoptic_swin_l.py",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=MODELS, default="vitdet_b", help="whose encoder and plan (default: vitdet_b)"
    )
    parser.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the square image")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="by autocast")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed runs of each encoder")
    parser.add_argument("--published", action="store_true", help="also the plan as its authors' code computes it")
    parser.add_argument("--output", default="output/benchmarks", metavar="FOLDER", help="of the table and the JSON")
    parser.add_argument("overrides", nargs="*", metavar="plan.key=value", help="of the model's plan")
    return parser.parse_intermixed_args(arguments)


def load_encoder(args: argparse.Namespace) -> tuple[nn.Module, Plan]:
    """The model's encoder with random weights, and its plan."""
    cfg = load_config(str(ROOT / "configs" / MODELS[args.model]), [f"train.device={args.device}", *args.overrides])
    args.device = cfg.train.device
    torch.manual_seed(0)
    _, encoder = find_encoder(instantiate(cfg.model.backbone))
    return encoder.eval().to(args.device), build(cfg, "plan")


def measure(encoders: dict[str, nn.Module], image: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Name -> {"ms", "reduction_ms": one a run, "gflops", "reduction_gflops", "peak_memory_mb"}."""
    clock, memory = Clock(args.device), PeakMemory(args.device)
    watches = {name: Stopwatch(encoder, encoder, clock) for name, encoder in encoders.items()}
    results = {name: {"ms": [], "reduction_ms": [], "peak_memory_mb": 0.0} for name in encoders}
    dtype = getattr(torch, args.dtype)
    with torch.no_grad(), torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
        for i in tqdm(range(-1, args.repeats), desc=f"timing {args.model}", unit="round"):
            for name in list(encoders) if i % 2 else reversed(encoders):
                memory.reset()
                _, run = watches[name].run(image)
                if i < 0:  # warm-up
                    continue
                results[name]["ms"].append(run.encoder)
                results[name]["reduction_ms"].append(run.reduction)
                results[name]["peak_memory_mb"] = max(results[name]["peak_memory_mb"], memory.read())
        for watch in watches.values():
            watch.close()
        for name, encoder in encoders.items():
            results[name]["gflops"] = count_gflops(encoder, (image[:1],))
            results[name]["reduction_gflops"] = _reduction_gflops(encoder, image[:1])
    return results


def _reduction_gflops(encoder: nn.Module, image: torch.Tensor) -> float:
    """Of reducing and restoring alone: the restored map is that of the reduced tokens as they are."""

    class ReduceAndRestore(nn.Module):
        def __init__(self, reducer: Reducer):
            super().__init__()
            self.reducer = reducer

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            reduction = self.reducer(tokens)
            return reduction.restore(reduction.tokens)

    reducer = getattr(encoder, "reducer", None)
    if reducer is None:
        return 0.0
    maps = []
    handle = reducer.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    encoder(image)
    handle.remove()
    return sum(count_gflops(ReduceAndRestore(reducer), (tokens,)) for tokens in maps)


def to_document(results: dict[str, Any], plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, for programs; times in ms."""
    first = np.array(results["unmodified"]["ms"])
    encoders = {}
    for name, result in results.items():
        times, reduction = np.array(result["ms"]), np.array(result["reduction_ms"])
        encoders[name] = {
            "latency_ms": spread(times),
            "speedup": ratio_of_medians(first, times)._asdict(),
            "reduction_ms": float(np.median(reduction)),
            "efficiency": float(np.median(times - reduction) / np.median(times)),
            "gflops": result["gflops"],
            "reduction_gflops": result["reduction_gflops"],
            "peak_memory_mb": result["peak_memory_mb"],
        }
    what = {key: getattr(args, key) for key in ("model", "size", "batch", "device", "dtype", "repeats")}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {**what, **machine, "plan": plan.describe(), "encoders": encoders}


def to_table(document: dict[str, Any]) -> str:
    headers = ["encoder", "ms (p10-p90)", "speed-up", "reducing, restoring, ms", "efficiency", "GFLOPs"]
    headers += ["of that reducing", "peak memory, MB"]
    rows = []
    for name, result in document["encoders"].items():
        planned = result["reduction_ms"] > 0
        rows.append(
            [
                name,
                "{median:.0f} ({p10:.0f}-{p90:.0f})".format(**result["latency_ms"]),
                "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**result["speedup"]),
                f"{result['reduction_ms']:.1f}" if planned else "",
                f"{100 * result['efficiency']:.1f} %" if planned else "",
                f"{result['gflops']:.1f}",
                f"{result['reduction_gflops']:.1f}" if planned else "",
                f"{result['peak_memory_mb']:.0f}",
            ]
        )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 7)


def main(args: argparse.Namespace) -> None:
    for name in ("size", "batch", "repeats"):
        check_count(f"--{name}", getattr(args, name), 1)
    check_folder("--output", args.output)
    encoder, plan = load_encoder(args)
    plans = {"unmodified": Plan(), "expedited": plan, "control": plan.control()}
    if args.published:
        plans["published"] = Plan(plan.reducer, plan.start, plan.stop, plan.scope, published=True)
    encoders = {name: hourglass.expedite(encoder, its_plan) for name, its_plan in plans.items()}
    image = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    document = to_document(measure(encoders, image, args), plan, args)
    table = to_table(document)
    name = f"{args.model}_{args.size}_{args.device}_{args.dtype}"
    print(
        f"\n{args.model}, {args.size} x {args.size} pixels, {args.device} ({document['threads']} threads), {args.dtype}"
    )
    print(f"plan: {plan!r}\n\n{table}\n")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", json.dumps(document, indent=2) + "\n")
    write_whole(folder / f"{name}.md", table + "\n")
    print(f"written to {folder / name}.json and .md")


if __name__ == "__main__":
    try:
        main(parse())
    except InputError as error:
        refuse(str(error))
