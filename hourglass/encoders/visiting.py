"""Running an encoder up to its planned blocks, with a function in their place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hourglass.contexts import evaluating
from hourglass.encoders.hourglass import Hourglass, Middle
from hourglass.encoders.registry import find_encoder
from hourglass.encoders.sharing import hide
from hourglass.errors import InputError
from hourglass.reduction.reducer import Reducer

#: The number of a stage's first block among those of the plan, its map (B, H, W, C), its planned blocks and their
#: reducer -> the map (B, H, W, C) that the encoder goes on with.
Visit = Callable[[int, Tensor, Sequence[nn.Module], Reducer], Tensor]


class _Visited(Exception):
    """The last of the plan's blocks has run; what follows is not needed."""


class _Visitor(Reducer):
    def __init__(self, reducer: Reducer, visit: Visit, last: bool):
        super().__init__()
        self.reducer = reducer
        self.visit = visit
        self.last = last

    def run(self, tokens: Tensor, blocks: Sequence[nn.Module], proportional: bool, first: int = 0) -> Tensor:
        restored = self.visit(first, tokens, blocks, self.reducer)
        if self.last:
            raise _Visited
        return restored


def middles_of(view: nn.Module) -> dict[int, Middle]:
    """Where an expedited model runs its plan's blocks: number of a stage's first planned block -> what runs them."""
    encoder = find_encoder(view)[1]
    assert isinstance(encoder, Hourglass)
    middles = [module for module in encoder._body.modules() if isinstance(module, Middle)]
    return {encoder._planned.start + middle.first: middle for middle in middles}


@contextmanager
def visiting(view: nn.Module, visit: Visit) -> Iterator[Callable[[Any], None]]:
    """
    Call ``visit`` in place of a plan's blocks, in evaluation mode and without gradients.

    Args:
        view: an expedited model.
        visit: see :data:`Visit`.

    Returns:
        a function that runs the model on inputs, up to the last of the plan's blocks. It raises InputError where the
        model does not call them.
    """
    middles = list(middles_of(view).values())
    reducers = [middle.reducer for middle in middles]

    def run(inputs: Any) -> None:
        try:
            view(inputs)
        except _Visited:
            return
        raise InputError(f"{type(view).__name__} ran without the plan's blocks")

    try:
        for middle, reducer in zip(middles, reducers):
            hide(middle, reducer=_Visitor(reducer, visit, middle is middles[-1]))
        with evaluating(view), torch.no_grad():
            yield run
    finally:
        for middle, reducer in zip(middles, reducers):
            hide(middle, reducer=reducer)
