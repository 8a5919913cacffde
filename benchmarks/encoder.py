"""
Time an encoder with random weights against itself with fast attention and on fewer tokens, in one process and in turn.

    python -m benchmarks.encoder --model vitdet_b
    python -m benchmarks.encoder --model swin_l --size 1152 --published
    python -m benchmarks.encoder --model vitdet_b --calibrated 'plan.reducer.grid=[7,7]' plan.keys=2
    python -m benchmarks.encoder --model vitdet_b --scaling plan.scope=map 'plan.reducer.grid=[46,46]'
"""

import argparse
import copy
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hourglass  # first: it mends Detectron2 0.6

# isort: split
import numpy as np
import torch
from detectron2.config import instantiate
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.dense_clustering import DenseClustering
from hourglass import InputError, Plan, TokenClustering
from hourglass.checks import check_count
from hourglass.compat import detectron2_encoder
from hourglass.config import find_encoder_node
from hourglass.encoders import HourglassViT
from hourglass.encoders.registry import family_of
from hourglass.encoders.visiting import visiting
from hourglass.evaluation.cost import PeakMemory, count_gflops
from hourglass.evaluation.environment import processor
from hourglass.evaluation.report import spread
from hourglass.evaluation.resampling import ratio_of_medians
from hourglass.evaluation.timing import Clock, Stopwatch
from hourglass.files import check_folder, write_whole
from hourglass.fitting import Recorder, fit, to_calibration
from hourglass.launch import build, load_config, one_line
from hourglass.reduction import Reducer
from hourglass.reduction.reducer import Place

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "vitdet_b": "vitdet/mask_rcnn_b.py",
    "vitdet_l": "vitdet/mask_rcnn_l.py",
    "vitdet_h": "vitdet/mask_rcnn_h.py",
    "swin_t": "mask2former/coco_panoptic_swin_t.py",
    "swin_s": "mask2former/coco_panoptic_swin_s.py",
    "swin_b": "mask2former/coco_panoptic_swin_b.py",
    "swin_l": "mask2former/coco_panoptic_swin_l.py",
}
SCALING_SIZES = (512, 768, 1024, 1536, 2048)
# The formula is left out where its scores, of which three copies are held, take more than this.
SCORES_LIMIT_MB = 5000
# Of a calibration's maps, as a share of the channels.
RANK = 0.25


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=MODELS, default="vitdet_b", help="model whose encoder and plan are timed (default: vitdet_b)"
    )
    parser.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the square image")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images in a batch")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each encoder (default: 5)")
    parser.add_argument("--published", action="store_true", help="also time the plan as its authors' code computes it")
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="also time the plan calibrated, with maps of a quarter of the channels as trained models have",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time the encoders under torch.compile (needs a C++ compiler)"
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory; on CPUs in a process of its own for each encoder",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help=f"time the parts of a ViT at {SCALING_SIZES[0]} to {SCALING_SIZES[-1]} pixels and fit how they grow",
    )
    parser.add_argument(
        "--output", default="output/benchmarks", metavar="FOLDER", help="folder of tables, JSON and plot"
    )
    parser.add_argument("overrides", nargs="*", metavar="plan.key=value", help="overrides of the model's plan")
    return parser.parse_intermixed_args(arguments)


def load_encoder(args: argparse.Namespace) -> tuple[nn.Module, Plan]:
    """The model's encoder with random weights, Detectron2's own class where it has one, and the model's plan."""
    cfg = load_config(str(ROOT / "configs" / MODELS[args.model]), [f"train.device={args.device}", *args.overrides])
    args.device = cfg.train.device
    node = copy.deepcopy(find_encoder_node(cfg))
    detectron2_class = detectron2_encoder("ViT" if args.model.startswith("vit") else "SwinTransformer")
    if detectron2_class is not None:
        node._target_ = detectron2_class
        node.pop("out_names", None)  # which ours has for Mask2Former's
    torch.manual_seed(0)
    encoder = instantiate(node)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name:  # zero at the start of training, but not here
                parameter.normal_(std=0.02)
    return encoder.eval().to(args.device), build(cfg, "plan")


def make_plans(plan: Plan, published: bool) -> dict[str, Plan]:
    plans = {"unmodified": Plan(), "fast attention": Plan(attention="fast"), "expedited": plan}
    plans["control"] = plan.control()
    if plan.keys > 1:
        plans[f"keys of {plan.keys} x {plan.keys} tokens"] = Plan(attention="fast", keys=plan.keys)
    if published:
        plans["published"] = Plan(plan.reducer, plan.start, plan.stop, plan.scope, published=True)
    return plans


def calibrated(encoder: nn.Module, plan: Plan, image: Tensor) -> Plan:
    """The plan, calibrated on noise: the correction takes as long as that of a trained model."""
    view = hourglass.expedite(encoder, plan.to_be_calibrated())
    recorder = Recorder(plan.proportional, folds=2)
    with visiting(view, recorder) as run:
        for recorder.fold in range(2):
            run(torch.randn_like(image[:1]))
    fits = {
        first: fit(moments, forms=("full",), ridges=(0.1,), shares=(RANK,))
        for first, moments in recorder.moments.items()
    }
    return plan.calibrated(to_calibration(fits, view, plan, 2, "noise"))


class Compiled(nn.Module):
    """An encoder through torch.compile. Its parts are no submodules: nothing inside is timed."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self._run = [torch.compile(encoder)]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self._run[0](image)


def measure(encoders: dict[str, nn.Module], image: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Name -> {"ms", "reduction_ms": one a run, "gflops", "reduction_gflops", and on CUDA "peak_memory_mb"}."""
    clock, memory = Clock(args.device), PeakMemory(args.device)
    with torch.no_grad(), autocast(args):
        for name in [name for name, encoder in encoders.items() if isinstance(encoder, Compiled)]:
            try:
                encoders[name](image)
            except Exception as error:  # no C++ compiler, say
                reason = str(error).strip().splitlines()[0]
                print(f"warning: {name}: left out, {type(error).__name__}: {reason}", file=sys.stderr)
                del encoders[name]
        watches = {name: Stopwatch(encoder, encoder, clock) for name, encoder in encoders.items()}
        results = {name: {"ms": [], "reduction_ms": [], "peak_memory_mb": None} for name in encoders}
        for i in tqdm(range(-1, args.repeats), desc=f"timing {args.model}", unit="round"):
            for name in list(encoders) if i % 2 else reversed(encoders):
                memory.reset()
                _, run = watches[name].run(image)
                if i < 0:  # warm-up
                    continue
                results[name]["ms"].append(run.encoder)
                results[name]["reduction_ms"].append(run.reduction)
                if args.device == "cuda":
                    results[name]["peak_memory_mb"] = max(results[name]["peak_memory_mb"] or 0.0, memory.read())
        for watch in watches.values():
            watch.close()
    for name, encoder in encoders.items():  # not under autocast, whose copies of weights no trace takes
        if not isinstance(encoder, Compiled):
            results[name]["gflops"] = count_gflops(encoder, (image[:1],))
            results[name]["reduction_gflops"] = _reduction_gflops(encoder, image[:1])
    return results


def autocast(args: argparse.Namespace) -> torch.autocast:
    dtype = getattr(torch, args.dtype)
    return torch.autocast(args.device, dtype, enabled=dtype != torch.float32)


def _reduction_gflops(encoder: nn.Module, image: Tensor) -> float | None:
    """Of reducing and restoring alone; None where that is part of each block."""
    reducer = getattr(encoder, "reducer", None)
    if reducer is None:
        return 0.0
    if reducer.each_block:
        return None
    return sum(count_gflops(ReduceAndRestore(reducer), (tokens,)) for tokens in _reduced_maps(encoder, image))


def _reduced_maps(encoder: nn.Module, image: Tensor) -> list[Tensor]:
    """What the encoder's reducer is called with."""
    maps = []
    handle = encoder.reducer.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    with torch.no_grad():
        encoder(image)
    handle.remove()
    return maps


class ReduceAndRestore(nn.Module):
    """The restored map is that of the reduced tokens as they are."""

    def __init__(self, reducer: Reducer):
        super().__init__()
        self.reducer = reducer

    def forward(self, tokens: Tensor) -> Tensor:
        reduction = self.reducer(tokens)
        return reduction.restore(reduction.tokens)


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """The peak of a process that runs this encoder alone, in MB."""
    warnings.filterwarnings("ignore")
    encoder, plan = load_encoder(args)
    encoder = hourglass.expedite(encoder, make_plans(plan, args.published)[name])
    memory = PeakMemory(args.device)
    memory.reset()
    with torch.no_grad(), autocast(args):
        encoder(torch.randn(args.batch, 3, args.size, args.size))
    return memory.read()


def measure_peak_memory(results: dict[str, Any], names: list[str], args: argparse.Namespace) -> None:
    """On CPUs the peak is the process's: each encoder has one of its own."""
    context = multiprocessing.get_context("spawn")
    for name in tqdm(names, desc="peak memory", unit="encoder"):
        with ProcessPoolExecutor(1, context) as pool:
            results[name]["peak_memory_mb"] = pool.submit(peak_memory, args, name).result()


def in_turn(parts: dict[str, Callable[[], Any]], args: argparse.Namespace, title: str) -> dict[str, np.ndarray]:
    """Milliseconds of each part's runs, after one for warm-up."""
    clock = Clock(args.device)
    times: dict[str, list[float]] = {name: [] for name in parts}
    with torch.no_grad(), autocast(args):
        for i in tqdm(range(-1, args.repeats), desc=title, unit="round"):
            for name in list(parts) if i % 2 else reversed(parts):
                clock.synchronize()
                start = clock.mark()
                parts[name]()
                stop = clock.mark()
                clock.synchronize()
                if i >= 0:
                    times[name].append(clock.between(start, stop))
    return {name: np.array(values) for name, values in times.items()}


def measure_parts(encoder: nn.Module, plan: Plan, image: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """
    A global block's attention by the formula and fast, and the plan's reducing and restoring beside clustering as it is
    published: each pair on the same input, with how much the results differ.
    """
    parts = {}
    if args.model.startswith("vit"):
        block = next(block for block in encoder.blocks if block.window_size == 0)
        side = args.size // 16
        # So large that random weights attend to few tokens, as trained ones do.
        tokens = 4 * torch.randn(args.batch, side, side, block.attn.qkv.in_features, device=args.device)
        plainly, fast = (family_of(encoder).placed(block, is_fast).attn for is_fast in (False, True))
        ways = {
            "plain formula": lambda: plainly(tokens, Place((side, side))),
            "fast": lambda: fast(tokens, Place((side, side))),
        }
        with torch.no_grad(), autocast(args):
            difference = torch.sub(*(method() for method in ways.values()))
        parts["attention of a global block"] = _compare(ways, difference, args)
    if isinstance(plan.reducer, TokenClustering) and plan.scope == "map":
        with autocast(args):
            reduced = _reduced_maps(hourglass.expedite(encoder, plan), image)[-1]
        reducer = plan.reducer
        # At one temperature the centres are the same to rounding.
        clustering = TokenClustering(
            reducer.grid, reducer.iterations, reducer.neighborhood, temperature=0.01, k=reducer.k
        )
        dense = DenseClustering(clustering)
        with torch.no_grad():
            difference = clustering(reduced).tokens - dense(reduced).tokens
        ways = {"tokens x centres": _reduction_of(dense, reduced), "ours": _reduction_of(reducer, reduced)}
        parts["reducing and restoring"] = _compare(ways, difference, args)
    return parts


def _reduction_of(reducer: Reducer, tokens: Tensor) -> Callable[[], Tensor]:
    return lambda: ReduceAndRestore(reducer)(tokens)


def _compare(ways: dict[str, Callable[[], Tensor]], difference: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Two ways in turn, the slow one first; ``difference``: of their results."""
    slow, fast = ways
    times = in_turn(ways, args, f"timing {slow} and {fast}")
    return {
        "ms": {name: spread(values) for name, values in times.items()},
        "speedup": ratio_of_medians(times[slow], times[fast])._asdict(),
        "difference": float(difference.abs().max()),
    }


def to_document(results: dict[str, Any], plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, for programs; times in ms."""
    first = np.array(results["unmodified"]["ms"])
    encoders = {}
    for name, result in results.items():
        times, reduction = np.array(result["ms"]), np.array(result["reduction_ms"])
        ideal = float(np.median(times - reduction))
        encoders[name] = {
            "latency_ms": spread(times),
            "speedup": ratio_of_medians(first, times)._asdict(),
            "reduction_ms": float(np.median(reduction)),
            "reduction_share_of_unmodified": float(np.median(reduction) / np.median(first)),
            "ideal_ms": ideal,
            "efficiency": ideal / float(np.median(times)),
            "gflops": result.get("gflops"),
            "reduction_gflops": result.get("reduction_gflops"),
            "peak_memory_mb": result["peak_memory_mb"],
        }
    return {**about(args), "plan": plan.describe(), "encoders": encoders}


def about(args: argparse.Namespace) -> dict[str, Any]:
    settings = {key: getattr(args, key) for key in ("model", "size", "batch", "device", "dtype", "repeats")}
    return {**settings, **machine(args.device)}


def machine(device: str) -> dict[str, Any]:
    description = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device == "cuda":
        description["gpu"] = torch.cuda.get_device_name()
    return description


def to_table(document: dict[str, Any]) -> str:
    headers = ["encoder", "ms (p10-p90)", "speed-up", "reducing, restoring, ms", "ideal, ms", "efficiency", "GFLOPs"]
    headers += ["of that reducing", "peak memory, MB"]
    rows = []
    for name, result in document["encoders"].items():
        planned = result["reduction_ms"] > 0
        rows.append(
            [
                name,
                "{median:.{digits}f} ({p10:.{digits}f}-{p90:.{digits}f})".format(
                    **result["latency_ms"], digits=0 if result["latency_ms"]["median"] > 100 else 2
                ),
                "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**result["speedup"]),
                f"{result['reduction_ms']:.1f}" if planned else "",
                f"{result['ideal_ms']:.1f}" if planned else "",
                f"{100 * result['efficiency']:.1f} %" if planned else "",
                "" if result["gflops"] is None else f"{result['gflops']:.1f}",
                f"{result['reduction_gflops']:.1f}" if planned and result["reduction_gflops"] is not None else "",
                f"{result['peak_memory_mb']:.0f}" if result["peak_memory_mb"] else "",
            ]
        )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 8)


def parts_to_table(parts: dict[str, Any]) -> str:
    rows = []
    for name, part in parts.items():
        for method, times in part["ms"].items():
            last = method == list(part["ms"])[-1]
            rows.append(
                [
                    f"{name}, {method}",
                    "{median:.1f} ({p10:.1f}-{p90:.1f})".format(**times),
                    "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**part["speedup"]) if last else "",
                    f"{part['difference']:.1e}" if last else "",
                ]
            )
    headers = ["part", "ms (p10-p90)", "speed-up", "largest difference"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 3)


def scale(args: argparse.Namespace) -> dict[str, Any]:
    """Median times of a ViT's parts over the size of the image, and the exponent of time against tokens."""
    encoder, plan = load_encoder(args)
    if not isinstance(hourglass.expedite(encoder, plan), HourglassViT):
        raise InputError(f"--scaling needs a ViT's model, got {args.model}")
    family = family_of(encoder)
    global_block = next(block for block in encoder.blocks if block.window_size == 0)
    windowed, fast = (
        family.placed(block, fast=True)
        for block in (next(block for block in encoder.blocks if block.window_size > 0), global_block)
    )
    if plan.reducer is None or plan.reducer.each_block or plan.scope != "map":
        raise InputError(f'--scaling needs a plan with a reducer that makes one smaller map, scope "map", got {plan!r}')
    # Its budget as a share of the config's map, 64 x 64 tokens at 1024 pixels.
    reducer = plan.reducer.relative_to((64, 64))
    times: dict[str, dict[int, float]] = {}
    for pixels in SCALING_SIZES:
        side = pixels // 16
        torch.manual_seed(pixels)
        tokens = torch.randn(args.batch, side, side, global_block.attn.qkv.in_features, device=args.device)
        parts = {
            "reducing and restoring": _reduction_of(reducer, tokens),
            "windowed block": lambda tokens=tokens: windowed(tokens),
            "global block": lambda tokens=tokens: fast(tokens),
        }
        if 4e-6 * args.batch * global_block.attn.num_heads * side**4 < SCORES_LIMIT_MB:
            parts["global block, plain formula"] = lambda tokens=tokens: global_block(tokens)
        for name, values in in_turn(parts, args, f"{pixels} pixels").items():
            times.setdefault(name, {})[side * side] = float(np.median(values))
    exponents = {
        name: float(np.polyfit(np.log(list(line)), np.log(list(line.values())), 1)[0]) for name, line in times.items()
    }
    return {**about(args), "plan": plan.describe(), "median_ms": times, "exponents": exponents}


def scaling_to_table(document: dict[str, Any]) -> str:
    sizes = [(pixels // 16) ** 2 for pixels in SCALING_SIZES]
    headers = ["part, ms", *(f"{n} tokens" for n in sizes), "exponent"]
    rows = [
        [name, *(f"{line[n]:.1f}" if n in line else "" for n in sizes), f"{document['exponents'][name]:.2f}"]
        for name, line in document["median_ms"].items()
    ]
    return tabulate(
        rows, headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )


def plot_scaling(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, line in document["median_ms"].items():
        axes.loglog(list(line), list(line.values()), marker="o", label=f"{name}: n^{document['exponents'][name]:.2f}")
    tokens = [(pixels // 16) ** 2 for pixels in SCALING_SIZES]
    axes.set_xticks(tokens, [f"{n:,}\n{pixels} px" for n, pixels in zip(tokens, SCALING_SIZES)], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("tokens of the full map")
    axes.set_ylabel("ms, median")
    axes.set_title(f"{document['model']}, {document['device']}, {document['dtype']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    for name in ("size", "batch", "repeats"):
        check_count(f"--{name}", getattr(args, name), 1)
    check_folder("--output", args.output)
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder = Path(args.output)
    if args.scaling:
        document = scale(args)
        table = scaling_to_table(document)
        name = f"{args.model}_scaling_{args.device}_{args.dtype}"
        print(f"\n{table}\n")
        save(folder, name, document, table)
        plot_scaling(document, folder / f"{name}.png")
        print(f"written to {folder / name}.json, .md and .png")
        return
    encoder, plan = load_encoder(args)
    encoders = {name: hourglass.expedite(encoder, its) for name, its in make_plans(plan, args.published).items()}
    plain = list(encoders)
    image = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    if args.calibrated:
        encoders["expedited, calibrated"] = hourglass.expedite(encoder, calibrated(encoder, plan, image))
    if args.compile:
        for name in ("fast attention", "expedited"):
            plan_copy = copy.deepcopy(encoders[name].plan)  # with a reducer of its own, that is not timed
            encoders[f"{name}, compiled"] = Compiled(hourglass.expedite(encoder, plan_copy))
    results = measure(encoders, image, args)
    parts = measure_parts(encoder, plan, image, args)
    if args.device == "cpu" and args.memory:
        measure_peak_memory(results, plain, args)
    document = {**to_document(results, plan, args), "parts": parts}
    table = to_table(document) + (f"\n\n{parts_to_table(parts)}" if parts else "")
    machine = document.get("gpu") or f"{document['cpu']}, {document['threads']} threads"
    print(f"\n{args.model}, {args.size} x {args.size} pixels, {args.device} ({machine}), {args.dtype}")
    print(f"plan: {plan!r}\n\n{table}\n")
    name = f"{args.model}_{args.size}_{args.device}_{args.dtype}"
    save(folder, name, document, table)
    print(f"written to {folder / name}.json and .md")


def save(folder: Path, name: str, document: dict[str, Any], table: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Files of the project by their places in it: figures are read on other machines.
    text = json.dumps(document, indent=2).replace(f"{ROOT}/", "")
    write_whole(folder / f"{name}.json", text + "\n")
    write_whole(folder / f"{name}.md", table + "\n")


if __name__ == "__main__":
    with one_line():
        main(parse())
