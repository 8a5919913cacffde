"""Timing of a model's parts by hooks."""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from hourglass.reduction import Reducer, Reduction
from hourglass.reduction.calibrated import Guard


class Clock:
    """
    Marks points in time and gives the milliseconds between them. On CUDA a mark is an event in the stream, so that
    marking does not wait for the device.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def mark(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, stop) -> float:
        """Milliseconds; the device must have reached both marks."""
        return start.elapsed_time(stop) if self._cuda else (stop - start) * 1000

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class Run(NamedTuple):
    """
    One run of a model on a batch of images.

    Attributes:
        total: milliseconds from the input dictionaries to the output.
        encoder: milliseconds in the encoder.
        reduction: of those, milliseconds in reducers and in restoring.
        full: tokens of an image that entered the reducers; 0 without a reducer. Of those that act in each block, the
            mean over blocks of the tokens that they had to stand for.
        middle: tokens that left them, in the mean over blocks too.
        size: tokens of an image in the encoder's finest output.
        preprocessing: milliseconds from the input dictionaries to the encoder's first start.
        finite: whether the encoder's output was.
        images: of the batch.
        corrected: share of its plan's calibrated correction that an image got, in the mean; 1 without a calibration.
    """

    total: float
    encoder: float
    reduction: float
    full: float
    middle: float
    size: float
    preprocessing: float = 0.0
    finite: bool = True
    images: int = 1
    corrected: float = 1.0

    @property
    def rest(self) -> float:
        """Milliseconds that are neither preprocessing nor the encoder's."""
        return self.total - self.preprocessing - self.encoder


class Stopwatch:
    """
    Times the runs of a model, its encoder and the encoder's reducers by hooks, which :meth:`close` removes.

    Args:
        model: what is run.
        encoder: the part of it that is timed.
        clock: of the model's device.
        inside: also the encoder's reducers. Not where it, or another view of it, is compiled, which hooks would cut.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module, clock: Clock, inside: bool = True):
        self._model = model
        self._clock = clock
        self._spans: dict[str, list] = {"encoder": [], "reduction": []}
        self._tokens: list[tuple[int | torch.Tensor, int]] = []
        self._each_block = False
        self._size = 0
        self._sums: list[torch.Tensor] = []
        self._shares: list[torch.Tensor] = []
        # Other models may be views of the same modules, which then have the hooks too.
        self._running = False
        #: The encoder's input in the last run.
        self.encoder_input: tuple = ()
        self._handles = [
            encoder.register_forward_pre_hook(self._encoder_starts),
            encoder.register_forward_hook(self._encoder_stops),
        ]
        reducers: list[str] = []
        for name, module in encoder.named_modules() if inside else ():
            if isinstance(module, Guard):
                self._handles.append(module.register_forward_hook(self._record_share))
            # A reducer may call others, whose time is in its own.
            if isinstance(module, Reducer) and not any(name.startswith(f"{outer}.") for outer in reducers):
                reducers.append(name)
                self._each_block = module.each_block
                self._handles.append(module.register_forward_pre_hook(self._reducer_starts))
                self._handles.append(module.register_forward_hook(self._reducer_stops))

    def run(self, inputs: list[dict]) -> tuple[list[dict], Run]:
        """Run the model on Detectron2's ``inputs`` and return its outputs and times."""
        for spans in self._spans.values():
            spans.clear()
        self._tokens.clear()
        self._sums.clear()
        self._shares.clear()
        self._clock.synchronize()
        start, mark = time.perf_counter(), self._clock.mark()
        self._running = True
        try:
            outputs = self._model(inputs)
        finally:
            self._running = False
        self._clock.synchronize()
        total = (time.perf_counter() - start) * 1000
        encoder, reduction = (
            sum(self._clock.between(*span) for span in self._spans[part]) for part in ("encoder", "reduction")
        )
        preprocessing = self._clock.between(mark, self._spans["encoder"][0][0]) if self._spans["encoder"] else 0.0
        finite = all(math.isfinite(total) for total in self._sums)
        full, middle = (sum(float(count) for count in counts) for counts in zip(*self._tokens or [(0, 0)]))
        calls = (max(1, len(self._tokens)) if self._each_block else 1) * len(inputs)
        full, middle, size = full / calls, middle / calls, self._size / len(inputs)
        corrected = float(torch.cat(self._shares).mean()) if self._shares else 1.0
        return outputs, Run(
            total, encoder, reduction, full, middle, size, preprocessing, finite, len(inputs), corrected
        )

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, part: str) -> None:
        self._spans[part].append([self._clock.mark()])

    def _stop(self, part: str) -> None:
        self._spans[part][-1].append(self._clock.mark())

    def _encoder_starts(self, module: nn.Module, inputs: tuple) -> None:
        if not self._running:
            return
        self.encoder_input = inputs
        self._start("encoder")

    def _encoder_stops(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if not self._running:
            return
        self._stop("encoder")
        maps = _maps(output)
        self._size = max(feature_map.shape[0] * feature_map.shape[-2] * feature_map.shape[-1] for feature_map in maps)
        # What is not finite reaches the smallest output too; its sum costs least, and is read when the device is done.
        smallest = min(maps, key=torch.Tensor.numel)
        self._sums.append(smallest.sum(dtype=torch.float32))

    def _record_share(self, module: nn.Module, inputs: tuple, share: torch.Tensor) -> None:
        if self._running:
            self._shares.append(share.flatten().float())

    def _reducer_starts(self, module: nn.Module, inputs: tuple) -> None:
        if not self._running:
            return
        self._start("reduction")

    def _reducer_stops(self, module: nn.Module, inputs: tuple, reduction: Reduction) -> Reduction:
        if not self._running:
            return reduction
        self._stop("reduction")
        full: int | torch.Tensor = inputs[0].shape[:-1].numel()
        if self._each_block and reduction.sizes is not None:
            full = reduction.sizes.sum()
        self._tokens.append((full, reduction.tokens.shape[:-1].numel()))

        def restore(refined: torch.Tensor) -> torch.Tensor:
            self._start("reduction")
            tokens = reduction.restore(refined)
            self._stop("reduction")
            return tokens

        return reduction._replace(restore=restore)


def _maps(output: Any) -> list[torch.Tensor]:
    """The maps (B, C, H, W) that an encoder returned: a tensor, or a dictionary or sequence of some."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [feature_map for part in parts for feature_map in _maps(part)]
