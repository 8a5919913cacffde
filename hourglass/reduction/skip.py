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


class LinearBlocks(SkipBlocks):
    """
    The better control: one affine map, y = x M + b, in the place of the plan's blocks, fitted by a calibration, which
    its plan names. What a plan keeps over this one, it owes to the blocks.
    """

    needs_calibration = True
