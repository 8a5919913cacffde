"""States that a model is run in, and left as it was."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of a model's modules in evaluation mode."""
    # Module by module: views of one model share most of theirs.
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def without_autocast(tokens: Tensor) -> AbstractContextManager:
    """Computing in the tensors' own types; on the meta device, which has no autocast, as everywhere."""
    device = tokens.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
