from torch import Tensor

from hourglass.reduction.reducer import Reducer, Reduction


class SkipBlocks(Reducer):
    """
    The control: leaves the plan's blocks out. It reduces to no token at all, so that nothing is run, and restores
    the tokens as they were. What a model keeps of its accuracy so, it owes to its other blocks.
    """

    scopes = ("map",)

    def forward(self, tokens: Tensor) -> Reduction:
        return Reduction(tokens[:, :0, :0], positions=None, sizes=None, restore=lambda refined: tokens)
