from hourglass.encoders import eva  # noqa: F401  (registers its family)
from hourglass.encoders.expedite import expedite
from hourglass.encoders.plan import Plan
from hourglass.encoders.proof import verify
from hourglass.encoders.registry import find_encoder
from hourglass.encoders.swin import HourglassSwin, Swin
from hourglass.encoders.vit import HourglassViT, SimpleFeaturePyramid, ViT

__all__ = [
    "HourglassSwin",
    "HourglassViT",
    "Plan",
    "SimpleFeaturePyramid",
    "Swin",
    "ViT",
    "expedite",
    "find_encoder",
    "verify",
]
