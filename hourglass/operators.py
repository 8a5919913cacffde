"""Steps of a model that compiling takes as one."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("hourglass", "DEF")


def operator(
    arguments: str, shape: Callable[..., list], dtype: torch.dtype | None = None, like: int = 0
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """
    A decorator that makes a function an operator of torch's, ``torch.ops.hourglass.<its name>``. Compiling takes it as
    one step and does not look inside: the function may loop over and choose by sizes as it likes, without a graph
    break and without a new compilation for each size of image.

    Operators have no backward pass. Where a gradient is asked for, the function is run as it is; so it is under
    ``torch.jit.trace``, by which operations are counted, and ``torch.export``, whose programs are to run without this
    package.

    Args:
        arguments: as a schema of torch's, such as "Tensor tokens, int heads".
        shape: the function's arguments -> the shape of what it returns.
        dtype: of what it returns; None: that of the argument number ``like``.
        like: number of the argument, a tensor or a list of them, whose device the result is on.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__.lstrip("_")
        _library.define(f"{name}({arguments}) -> Tensor")

        def kernel(*values) -> Tensor:
            return function(*values).contiguous()

        def fake(*values) -> Tensor:
            model = values[like] if isinstance(values[like], Tensor) else values[like][0]
            return model.new_empty(shape(*values), dtype=dtype)

        for device in ("CPU", "CUDA"):
            _library.impl(name, kernel, device)
        _library.impl(name, fake, "Meta")

        @functools.wraps(function)
        def call(*values) -> Tensor:
            if needs_gradient(*values) or torch.jit.is_tracing() or is_exporting():
                return function(*values)
            return getattr(torch.ops.hourglass, name)(*values)

        return call

    return decorate


def is_exporting() -> bool:
    """
    Whether ``torch.export`` is at work, for ONNX too: what it is shown is to be operators of torch's own, functional,
    and few.
    """
    return getattr(torch.compiler, "is_exporting", _never)()  # new in torch 2.7


def is_symbolic(*sizes: Any) -> bool:
    """Whether one of the sizes is left open, as in a program for images of many sizes."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _never() -> bool:
    return False


def needs_gradient(*values) -> bool:
    """Whether a result of ``values``, tensors and others, is to have a gradient."""
    if not torch.is_grad_enabled():
        return False
    tensors = (tensor for value in values for tensor in (value if isinstance(value, list) else [value]))
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
