"""Custom operators: steps of a model that torch.compile does not look into."""

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
    A decorator that registers a function as ``torch.ops.hourglass.<name>``. torch.compile treats it as one step: the
    function may loop and branch on sizes without a graph break and without a new compilation for each image size.

    Operators have no backward pass. Where a gradient is needed the function itself runs; so it does under
    ``torch.jit.trace``, which counts operations, and ``torch.export``, whose programs run without this package.

    Args:
        arguments: in torch's schema language, such as "Tensor tokens, int heads".
        shape: maps the function's arguments to the shape of its result.
        dtype: of the result; None: that of argument number ``like``.
        like: number of the argument, a tensor or a list of tensors, whose device the result is on.
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
    Whether ``torch.export`` is running, for ONNX too. Code should then use few operators, all of them torch's own and
    functional.
    """
    return getattr(torch.compiler, "is_exporting", _never)()  # new in torch 2.7


def is_symbolic(*sizes: Any) -> bool:
    """Whether one of the sizes is symbolic, as in a program for images of many sizes."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _never() -> bool:
    return False


def needs_gradient(*values) -> bool:
    """Whether a result computed from ``values`` (tensors, lists of tensors, others) needs a gradient."""
    if not torch.is_grad_enabled():
        return False
    tensors = (tensor for value in values for tensor in (value if isinstance(value, list) else [value]))
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
