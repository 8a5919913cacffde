from hourglass.encoders.expedite import expedite, find_encoder
from hourglass.encoders.hourglass_vit import HourglassViT
from hourglass.encoders.plan import Plan
from hourglass.encoders.vit import SimpleFeaturePyramid, ViT

__all__ = ["HourglassViT", "Plan", "SimpleFeaturePyramid", "ViT", "expedite", "find_encoder"]
