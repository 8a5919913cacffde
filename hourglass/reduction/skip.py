from torch import Tensor

from hourglass.reduction.reducer import Reducer, Reduction


class SkipBlocks(Reducer):
    """
    A control that skips the plan's blocks: it reduces to no tokens and restores the tokens unchanged. The accuracy that
    a model keeps with it comes from the other blocks.
    """

    scopes = ("map",)

    def forward(self, tokens: Tensor) -> Reduction:
        return Reduction(tokens[:, :0, :0], positions=None, sizes=None, restore=lambda refined: tokens)


class LinearBlocks(SkipBlocks):
    """
    A control that replaces the plan's blocks by one affine map, y = x M + b, fitted by the calibration of its plan. The
    accuracy that a plan keeps beyond it comes from the blocks.
    """

    needs_calibration = True
