from hourglass.reduction.clustering import TokenClustering
from hourglass.reduction.pooling import AveragePooling
from hourglass.reduction.reducer import GridReducer, Reducer, Reduction
from hourglass.reduction.skip import SkipBlocks

__all__ = ["AveragePooling", "GridReducer", "Reducer", "Reduction", "SkipBlocks", "TokenClustering"]
