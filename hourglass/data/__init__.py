"""What opens data sets, checks and mends them, and reads images for training and evaluation."""

from hourglass.data.augmentation import EnlargeShortestEdge, RandomStain, StretchContrast
from hourglass.data.mapper import PanopticMapper

__all__ = ["EnlargeShortestEdge", "PanopticMapper", "RandomStain", "StretchContrast"]
