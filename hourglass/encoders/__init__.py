from hourglass.encoders.expedite import expedite, find_encoder
from hourglass.encoders.hourglass_swin import HourglassSwin
from hourglass.encoders.hourglass_vit import HourglassViT
from hourglass.encoders.plan import Plan
from hourglass.encoders.swin import Swin
from hourglass.encoders.vit import SimpleFeaturePyramid, ViT

__all__ = ["HourglassSwin", "HourglassViT", "Plan", "SimpleFeaturePyramid", "Swin", "ViT", "expedite", "find_encoder"]
