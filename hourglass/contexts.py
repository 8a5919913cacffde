"""Context managers that set a model's state and restore it."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set all of a model's modules to evaluation mode; at the end each has its mode back."""
    # Module by module: views of one model share most of theirs.
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def without_autocast(tokens: Tensor) -> AbstractContextManager:
    """Disable autocast on the tensors' device. The meta device has no autocast: there it does nothing."""
    device = tokens.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
