"""
The error that every plan makes in an encoder's maps, without labels, from few passes.

From each start and option the reduced blocks run once, and the map is restored after every block, so that one pass
gives all stops. The error after a block is carried to the end of its stage by the factor that the following blocks
multiply such errors with.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hourglass.contexts import evaluating
from hourglass.encoders import Plan, expedite, find_encoder
from hourglass.encoders.contract import Family, unwrapped
from hourglass.encoders.registry import family_of
from hourglass.encoders.sharing import unmodified
from hourglass.encoders.visiting import visiting
from hourglass.fitting import Moments, detail_of, fit
from hourglass.reduction import SkipBlocks
from hourglass.reduction.reducer import Place, Reducer, refine
from hourglass.reduction.scope import in_scope
from hourglass.reduction.windows import map_size
from hourglass.search.options import KEYS, Option, make_options

# Maps that are kept for it, in bytes.
MEMORY = 2 << 30
# Of an image, evenly spaced.
TOKENS = 1024
# Images that errors are carried through the blocks behind with.
CARRIED = 2
# Wider maps are calibrated by the smaller of the forms: a search fits hundreds.
WIDE = 256


class Stage(NamedTuple):
    """
    Blocks between which maps keep their size.

    Attributes:
        first: number of its first block.
        blocks: run on placed tokens, attention fast.
        windows: of each block, tokens a side; 0: global.
        kinds: of each block, what tells how long it takes: its window, and whether that is shifted.
    """

    first: int
    blocks: list[nn.Module]
    windows: list[int]
    kinds: list[tuple[int, bool]]

    @property
    def stop(self) -> int:
        return self.first + len(self.blocks)

    def bind(self, option: Option, tokens: Tensor) -> Reducer:
        """An option's reducer, ready for maps like these tokens (B, H, W, C)."""
        window = next((window for window in self.windows if window), None) if option.scope == "window" else None
        return in_scope(option.reducer, window, like=tokens[0, 0, 0])


class Traced(NamedTuple):
    """
    An encoder, and the maps that its blocks get.

    Attributes:
        view: of the model; its blocks are those of the stages.
        family: of the encoder.
        original_blocks: those of the encoder itself, in order.
        stages: in order.
        maps: of each stage and image, before its blocks and after the last (B, H, W, C).
        options: that fit the encoder.
    """

    view: nn.Module
    family: Family
    original_blocks: list[nn.Module]
    stages: list[Stage]
    maps: list[list[list[Tensor]]]
    options: list[Option]

    @property
    def depth(self) -> int:
        return self.stages[-1].stop

    def supports(self, option: Option, start: int, stop: int) -> bool:
        """Whether a plan with this option can have these blocks."""
        planned = [
            (block, window)
            for stage in self.stages
            for i, (block, window) in enumerate(zip(stage.blocks, stage.windows), start=stage.first)
            if start <= i < stop
        ]
        windows = {window for _, window in planned}
        if not option.reducer.on_grid and any(
            getattr(unwrapped(block), "use_residual_block", False) for block, _ in planned
        ):
            return False
        if option.scope == "window":
            return bool(windows - {0})
        return option.reducer.on_grid or not windows - {0}


def trace(model: nn.Module, images: Iterable[list[dict[str, Any]]], most: int = 6) -> Traced:
    """
    Run a model's encoder on images, and keep its maps.

    Args:
        model: as for :func:`hourglass.expedite`.
        images: what it is called with.
        most: images that are kept, fewer where memory is short.

    Raises:
        InputError: for a model whose encoder cannot be expedited, or has a block that no plan may run.
    """
    view = expedite(model, Plan(SkipBlocks(), 0, None))
    encoder = unmodified(find_encoder(view)[1])
    family = family_of(encoder)
    original_blocks = [block for stage in family.stages_of(encoder) for block in stage]
    stages: dict[int, Stage] = {}
    maps: dict[int, list[list[Tensor]]] = {}

    def visit(first: int, tokens: Tensor, blocks: Sequence[nn.Module], reducer: Reducer) -> Tensor:
        if first not in stages:
            attentions = [unwrapped(block).attn.attention_options for block in blocks]
            windows = [options.window_size for options in attentions]
            kinds = [(options.window_size, options.shifted) for options in attentions]
            stages[first] = Stage(first, list(blocks), windows, kinds)
        kept = [tokens]
        for block in blocks:
            kept.append(block(kept[-1], Place(map_size(tokens))))
        maps.setdefault(first, []).append(kept)
        return kept[-1]

    with visiting(view, visit) as run:
        for count, inputs in enumerate(images, start=1):
            run(inputs)
            size = sum(tokens.numel() * tokens.element_size() for kept in maps.values() for tokens in kept[0])
            if count >= most or (count >= 2 and (count + 1) * size > MEMORY):
                break
    ordered = [stages[first] for first in sorted(stages)]
    windows = {window for stage in ordered for window in stage.windows} - {0}
    ordered_maps = [maps[stage.first] for stage in ordered]
    return Traced(view, family, original_blocks, ordered, ordered_maps, make_options(windows))


class Errors(NamedTuple):
    """
    Squared errors, as shares of the variance of the map that they are in.

    Attributes:
        remaining: (start, stop, number of the option) -> after the block before ``stop``, calibrated, on images that it
            was not fitted to. Start and stop are of one stage.
        carried: number of a block -> what an error before it is at the end of its stage, over what it was.
        pooled: (number of the block, keys) -> of global blocks.
    """

    remaining: dict[tuple[int, int, int], float]
    carried: dict[int, float]
    pooled: dict[tuple[int, int], float]

    def of_plan(self, traced: Traced, start: int, stop: int, option: int | None, keys: int) -> float:
        """Of a plan, at the ends of the stages."""
        total = 0.0
        for stage in traced.stages:
            first, last = max(start, stage.first), min(stop, stage.stop)
            if option is not None and first < last:
                total += self.remaining[first, last, option] * self.carried.get(last, 1.0)
            if keys > 1:
                for i in range(stage.first, stage.stop):
                    if (i, keys) in self.pooled and (option is None or not start <= i < stop):
                        total += self.pooled[i, keys] * self.carried.get(i + 1, 1.0)
        return total


def measure_errors(traced: Traced) -> Errors:
    """The errors of every start, stop and option."""
    remaining: dict[tuple[int, int, int], float] = {}
    carried: dict[int, list[float]] = {}
    pooled: dict[tuple[int, int], float] = {}
    starts = [
        (number, i, start)
        for number, stage in enumerate(traced.stages)
        for i in range(len(traced.options))
        for start in range(len(stage.blocks))
    ]
    with evaluating(traced.view), torch.no_grad():
        for number, i, start in tqdm(starts, desc="measuring errors", unit="start", dynamic_ncols=True):
            stage, maps, option = traced.stages[number], traced.maps[number], traced.options[i]
            first = stage.first + start
            stops = [
                stop
                for stop in range(start + 1, len(stage.blocks) + 1)
                if traced.supports(option, first, stage.first + stop)
            ]
            if not stops:
                continue
            folds = {stop: [Moments(TOKENS), Moments(TOKENS)] for stop in stops}
            for image, kept in enumerate(maps):
                for stop, restored in _restored(stage, option, start, kept, folds, image % 2):
                    # The middle of the options stands for all; two blocks make an error as plans do.
                    if image < CARRIED and i == len(traced.options) // 2 and stop - start == min(2, stop):
                        if stop < len(stage.blocks):
                            carried.setdefault(stage.first + stop, []).append(_carry(stage, stop, restored, kept))
            forms = ("full",) if maps[0][0].shape[-1] <= WIDE else ("detail",)
            for stop, moments in folds.items():
                remaining[first, stage.first + stop, i] = fit(moments, forms, (1e-2,), guard=False).remaining
        for stage, maps in zip(traced.stages, traced.maps):
            for j, window in enumerate(stage.windows):
                if window or not traced.family.pools_keys:
                    continue
                for keys in KEYS[1:]:
                    block = traced.family.placed(traced.original_blocks[stage.first + j], True, keys=keys)
                    errors = [relative(block(kept[j], Place(map_size(kept[j]))), kept[j + 1]) for kept in maps]
                    pooled[stage.first + j, keys] = sum(errors) / len(errors)
    return Errors(remaining, {block: sum(ratios) / len(ratios) for block, ratios in carried.items()}, pooled)


def _restored(
    stage: Stage, option: Option, start: int, kept: list[Tensor], folds: dict[int, list[Moments]], fold: int
) -> Iterator[tuple[int, Tensor]]:
    """Run a stage's blocks on fewer tokens; the map restored after each, which the moments see."""
    tokens, size = kept[start], map_size(kept[start])
    reduction = stage.bind(option, tokens)(tokens)
    refined, detail = reduction.tokens, detail_of(reduction)
    for stop in range(start + 1, len(stage.blocks) + 1):
        refined = refine(reduction._replace(tokens=refined), size, [stage.blocks[stop - 1]])
        if stop in folds:
            yield stop, folds[stop][fold].observe(tokens, reduction, refined, kept[stop], detail)


def _carry(stage: Stage, stop: int, restored: Tensor, kept: list[Tensor]) -> float:
    before, tokens = relative(restored, kept[stop]), restored
    for block in stage.blocks[stop:]:
        tokens = block(tokens, Place(map_size(tokens)))
    return relative(tokens, kept[-1]) / max(before, 1e-12)


def relative(tokens: Tensor, truth: Tensor) -> float:
    """Squared error of a map (B, H, W, C), as a share of the variance of the true one."""
    variance = (truth - truth.mean(dim=(0, 1, 2))).double().square().sum()
    return float((tokens - truth).double().square().sum() / variance.clamp(min=1e-30))
