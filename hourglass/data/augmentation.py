"""Augmentations for microscopy, in Detectron2's form."""

import numpy as np
from detectron2.data import transforms as T

from hourglass.checks import check_count
from hourglass.errors import InputError

# Optical densities of haematoxylin, eosin and the residual (rows) in red, green and blue: Ruifrok and Johnston,
# "Quantification of histochemical staining by color deconvolution", Analytical and Quantitative Cytology 23 (2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)


class StretchContrast(T.Augmentation):
    """
    Stretch the intensities between two percentiles of the image, over all its channels, to the whole range of 8 bits.

    Exposures differ by orders of magnitude between microscopes; this is how nuclei are usually normalised.

    Args:
        low, high: percentiles that become 0 and 255.
    """

    def __init__(self, low: float = 1.0, high: float = 99.8):
        super().__init__()
        if not 0 <= low < high <= 100:
            raise InputError(f"low and high must be percentiles with low < high, got {low} and {high}")
        self.low, self.high = low, high

    def get_transform(self, image: np.ndarray) -> T.Transform:
        darkest, brightest = np.percentile(image, (self.low, self.high))
        if darkest == brightest:
            return T.NoOpTransform()
        return T.ColorTransform(lambda image: _to_bytes((image - darkest) * (255 / (brightest - darkest))))


class EnlargeShortestEdge(T.Augmentation):
    """
    Resize smaller images so that their shortest edge is `length` pixels; larger ones keep their size.

    Args:
        length: in pixels.
        zoom: (from, to): all images are scaled by a random factor between these besides; equal chances for doubling
            and halving.
    """

    def __init__(self, length: int, zoom: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        check_count("length", length, 1)
        if not 0 < zoom[0] <= zoom[1]:
            raise InputError(f"zoom must be two factors over 0, the smaller one first, got {tuple(zoom)}")
        self.length, self.zoom = length, zoom

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        scale = max(1.0, self.length / min(height, width))
        scale *= np.exp(np.random.uniform(*np.log(self.zoom)))
        size = round(height * scale), round(width * scale)
        return T.NoOpTransform() if size == (height, width) else T.ResizeTransform(height, width, *size)


class RandomStain(T.Augmentation):
    """
    Vary how strongly haematoxylin and eosin stain (Tellez et al., "Whole-slide mitosis detection in H&E breast
    histology using PHH3 as a reference to train distilled stain-invariant convolutional networks", TMI 37, 2018): an
    image's optical densities are taken apart into the stains, each is scaled and shifted at random, and put together
    again. Images without colour are left as they are.

    Args:
        scale: each stain's density is multiplied by 1 - scale to 1 + scale.
        shift: and has -shift to shift added.
    """

    def __init__(self, scale: float = 0.2, shift: float = 0.03):
        super().__init__()
        for name, value in (("scale", scale), ("shift", shift)):
            if not 0 <= value < 1:
                raise InputError(f"{name} must be a number from 0 to below 1, got {value}")
        self.scale, self.shift = scale, shift

    def get_transform(self, image: np.ndarray) -> T.Transform:
        if (image == image[..., :1]).all():
            return T.NoOpTransform()
        scale = np.random.uniform(1 - self.scale, 1 + self.scale, 3)
        shift = np.random.uniform(-self.shift, self.shift, 3)

        def vary(image: np.ndarray) -> np.ndarray:
            density = -np.log10((image.astype(np.float64) + 1) / 256)
            stains = density @ np.linalg.inv(STAINS) * scale + shift
            return _to_bytes(256 * 10 ** -(stains @ STAINS) - 1)

        return T.ColorTransform(vary)


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
