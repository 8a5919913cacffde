from hourglass.reduction.clustering import TokenClustering
from hourglass.reduction.density import DensityPeaks
from hourglass.reduction.lines import GridMerging
from hourglass.reduction.matching import BipartiteMatching
from hourglass.reduction.pooling import AveragePooling
from hourglass.reduction.reducer import GridReducer, MergingReducer, Reducer, Reduction, SelectingReducer
from hourglass.reduction.selection import TokenSelection, collect_losses
from hourglass.reduction.skip import LinearBlocks, SkipBlocks

__all__ = [
    "AveragePooling",
    "BipartiteMatching",
    "DensityPeaks",
    "GridMerging",
    "GridReducer",
    "LinearBlocks",
    "MergingReducer",
    "Reducer",
    "Reduction",
    "SelectingReducer",
    "SkipBlocks",
    "TokenClustering",
    "TokenSelection",
    "collect_losses",
]
