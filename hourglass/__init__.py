"""Large vision transformers for detection and segmentation, their middle blocks on fewer tokens."""

from hourglass import (
    compat,  # noqa: F401  (first: it mends Detectron2 0.6 before anything imports it)
    config,
)
from hourglass.config import add_hourglass_config
from hourglass.encoders import HourglassSwin, HourglassViT, Plan, expedite, verify
from hourglass.errors import InputError
from hourglass.fitting import calibrate
from hourglass.reduction import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    GridMerging,
    LinearBlocks,
    Reducer,
    Reduction,
    SkipBlocks,
    TokenClustering,
    TokenSelection,
)
from hourglass.version import __version__

__all__ = [
    "AveragePooling",
    "BipartiteMatching",
    "DensityPeaks",
    "GridMerging",
    "HourglassSwin",
    "HourglassViT",
    "InputError",
    "LinearBlocks",
    "Plan",
    "Reducer",
    "Reduction",
    "SkipBlocks",
    "TokenClustering",
    "TokenSelection",
    "__version__",
    "add_hourglass_config",
    "calibrate",
    "config",
    "expedite",
    "verify",
]
