"""The reducers and scopes that a search tries."""

from collections.abc import Collection
from typing import NamedTuple

from hourglass.reduction import DensityPeaks, GridMerging, Reducer, TokenClustering

# Of the rows and of the columns of a window or map.
SHARES = (0.75, 0.625, 0.5, 0.375)
# Sides of the cells that keys are pooled to.
KEYS = (1, 2, 4)


class Option(NamedTuple):
    """
    A reducer with its budget, and what it is applied to.

    Attributes:
        reducer: of one smaller map, not bound to an encoder.
        scope: "window" or "map".
        share: of the tokens that it keeps, about.
    """

    reducer: Reducer
    scope: str
    share: float

    @property
    def name(self) -> str:
        grid = self.reducer.describe()["grid"]
        size = f"{grid[0]} x {grid[1]}" if self.scope == "window" else f"{grid[0]:g} of each side"
        return f"{type(self.reducer).__name__} {size} a {self.scope}"


def make_options(windows: Collection[int]) -> list[Option]:
    """
    Args:
        windows: tokens a side of the encoder's windows, each size once; empty: all attention is global.
    """
    options = []
    if len(windows) == 1:
        (window,) = windows
        for side in sorted({max(2, round(share * window)) for share in SHARES} - {window}, reverse=True):
            for kind in (TokenClustering, DensityPeaks, GridMerging):
                options.append(Option(kind((side, side)), "window", (side / window) ** 2))
    if options:  # the whole map loses more at the same budget: clusters across windows mix what attends apart
        return options
    kinds = (TokenClustering, GridMerging) if windows else (TokenClustering, DensityPeaks, GridMerging)
    return [Option(kind(share), "map", share**2) for share in SHARES for kind in kinds]
