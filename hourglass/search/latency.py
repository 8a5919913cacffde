"""How long an encoder takes under a plan, from the times of its blocks on the machine at hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hourglass.contexts import evaluating
from hourglass.encoders import Plan, expedite, find_encoder
from hourglass.evaluation.timing import Clock, Stopwatch
from hourglass.reduction.calibrated import Calibrated
from hourglass.reduction.reducer import Place, refine
from hourglass.reduction.windows import map_size
from hourglass.search.options import KEYS
from hourglass.search.trace import Stage, Traced

ROUNDS = 7


class Latency(NamedTuple):
    """
    Milliseconds, medians of runs in turn.

    Attributes:
        encoder: with fast attention alone.
        full: (number of the stage, kind of block) -> on the full map.
        reduced: (stage, kind, number of the option) -> on the smaller map.
        reducing: (stage, option) -> reducing, restoring and correcting.
        pooled: (stage, kind, keys) -> on the full map with pooled keys.
    """

    encoder: float
    full: dict[tuple[int, Any], float]
    reduced: dict[tuple[int, Any, int], float]
    reducing: dict[tuple[int, int], float]
    pooled: dict[tuple[int, Any, int], float]

    def of_plan(self, traced: Traced, start: int, stop: int, option: int | None, keys: int) -> float:
        """The encoder's under a plan."""
        blocks = [(number, kind) for number, stage in enumerate(traced.stages) for kind in stage.kinds]
        of_blocks = sum(self.full[block] for block in blocks)
        # Blocks that were timed while the machine did something else do not take longer than the encoder does.
        scale = min(1.0, self.encoder / of_blocks)
        total = self.encoder - scale * of_blocks
        for number, stage in enumerate(traced.stages):
            if option is not None and max(start, stage.first) < min(stop, stage.stop):
                total += scale * self.reducing[number, option]
            for i, kind in enumerate(stage.kinds, start=stage.first):
                if option is not None and start <= i < stop:
                    total += scale * self.reduced[number, kind, option]
                else:
                    total += scale * self.pooled.get((number, kind, keys), self.full[number, kind])
        return total


def measure_latency(traced: Traced, model: torch.nn.Module, inputs: list[dict[str, Any]], device: str) -> Latency:
    """
    Time an encoder's parts, each in turn.

    Args:
        traced: the encoder; the maps of its last image are of the size that is timed.
        model: that the encoder is of.
        inputs: that image, as the model is called with.
        device: "cpu" or "cuda".
    """
    runs: dict[tuple, Callable[[], Any]] = {}
    for number, stage in enumerate(traced.stages):
        kept = traced.maps[number][-1]
        for kind in dict.fromkeys(stage.kinds):
            i = stage.kinds.index(kind)
            tokens, place = kept[i], Place(map_size(kept[i]))
            runs["full", number, kind] = _call(stage.blocks[i], tokens, place)
            if kind[0] == 0 and traced.family.pools_keys:
                for keys in KEYS[1:]:
                    block = traced.family.placed(traced.original_blocks[stage.first + i], True, keys=keys)
                    runs["pooled", number, kind, keys] = _call(block, tokens, place)
        _add_options(runs, traced, number, stage, kept[0])
    clock = Clock(device)
    fast = expedite(model, Plan(attention="fast"))
    watch = Stopwatch(fast, find_encoder(fast)[1], clock)
    times: dict[tuple, list[float]] = {key: [] for key in (("encoder",), *runs)}
    try:
        with evaluating(fast), evaluating(traced.view), torch.no_grad():
            for i in tqdm(range(1 + ROUNDS), desc="timing blocks", unit="round", dynamic_ncols=True):
                encoder = watch.run(inputs)[1].encoder
                measured = {("encoder",): encoder}
                for key, run in runs.items():
                    clock.synchronize()
                    start = clock.mark()
                    run()
                    stop = clock.mark()
                    clock.synchronize()
                    measured[key] = clock.between(start, stop)
                if i:  # the first round warms up
                    for key, value in measured.items():
                        times[key].append(value)
    finally:
        watch.close()
    medians = {key: float(np.median(values)) for key, values in times.items()}

    def part(name: str) -> dict:
        return {key[1:]: value for key, value in medians.items() if key[0] == name}

    return Latency(medians["encoder",], part("full"), part("reduced"), part("reducing"), part("pooled"))


def _add_options(
    runs: dict[tuple, Callable[[], Any]], traced: Traced, number: int, stage: Stage, tokens: Tensor
) -> None:
    channels = tokens.shape[-1]
    rank = max(1, channels // 8)
    corrections = {name: torch.zeros(channels, rank) for name in ("tokens", "reduced", "refined")}
    shapes = {"last": (rank, channels), "constant": (channels,), "whitening": (channels, channels)}
    tensors = {**corrections, **{name: torch.zeros(size) for name, size in shapes.items()}}
    for j, option in enumerate(traced.options):
        if option.scope == "window" and not any(stage.windows):
            continue
        bound = stage.bind(option, tokens)
        calibrated = Calibrated(bound, {0: tensors}).to(tokens)
        runs["reducing", number, j] = _call(calibrated.run, tokens, [], True)
        with torch.no_grad():
            reduction = bound(tokens)
        for kind in dict.fromkeys(stage.kinds):
            if option.scope == "map" and kind[0] and not option.reducer.on_grid:
                continue
            block = stage.blocks[stage.kinds.index(kind)]
            runs["reduced", number, kind, j] = _call(refine, reduction, map_size(tokens), [block])


def _call(function: Callable, *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)
