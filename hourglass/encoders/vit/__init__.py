from hourglass.encoders.vit.model import ChannelLayerNorm, SimpleFeaturePyramid, ViT
from hourglass.encoders.vit.placed import HourglassViT

__all__ = ["ChannelLayerNorm", "HourglassViT", "SimpleFeaturePyramid", "ViT"]
