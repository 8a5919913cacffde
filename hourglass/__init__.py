"""Large vision transformers for detection and segmentation, their middle blocks on fewer tokens."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from hourglass.prediction.predictor import Predictor

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
    "Predictor",
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


def __getattr__(name: str) -> Any:
    if name == "Predictor":  # imported when it is asked for: it takes what reads and evaluates data sets
        from hourglass.prediction.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
