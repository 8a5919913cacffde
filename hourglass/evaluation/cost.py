"""What a model costs in operations and memory."""

import logging
import re
import sys
from math import nan, prod
from pathlib import Path
from types import ModuleType

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _count_baddbmm(inputs: list, outputs: list) -> int:
    batch, rows, inner = inputs[1].type().sizes()
    return prod((batch, rows, inner, inputs[2].type().sizes()[-1]))


def _count_attention(inputs: list, outputs: list) -> int:
    """Both products, as fvcore counts those of attention that is written out; masks and softmax are free there too."""
    *batch, queries, channels = inputs[0].type().sizes()
    *_, keys, wide = inputs[2].type().sizes()
    return prod(batch) * queries * keys * (channels + wide)


def count_gflops(encoder: nn.Module, inputs: tuple) -> float:
    """
    Multiply-adds of one run, in 1e9, as fvcore counts them.

    Args:
        encoder: what is run.
        inputs: its arguments.

    Returns:
        the number; nan for an encoder that torch cannot trace, such as one with quantised layers.
    """
    analysis = FlopCountAnalysis(encoder, inputs)
    analysis.set_op_handle("aten::baddbmm", _count_baddbmm)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _count_attention)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    # The tracer's own warnings say that sizes become constants, which for one image they are.
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with torch.no_grad():
        try:
            return analysis.total() / 1e9
        except RuntimeError:  # a state of other things than tensors
            return nan


class PeakMemory:
    """
    The most memory held since :meth:`reset`, in MB: by the allocator on CUDA, else by the process (since its start
    where the system cannot reset its peak).

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            pass

    def read(self) -> float:
        """In MB; nan where the system does not tell."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        try:
            peak = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        except OSError:
            peak = None
        if peak is not None:
            return int(peak[1]) * 1024 / 1e6
        if resource is None:
            return nan
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
