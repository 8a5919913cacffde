"""How sure figures are: intervals from drawing the images again (Efron's bootstrap)."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Interval(NamedTuple):
    """A figure and the 95 % interval around it; nan where it has none."""

    ratio: float
    low: float
    high: float


class Resampled(Protocol):
    """An evaluator whose main figures can be had for any sample of the images, once it has evaluated."""

    image_ids: Sequence[Any]

    def resample(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            weights: (samples, images), how often each of `image_ids` is in a sample.

        Returns:
            "task.figure" -> (samples,)
        """


def draw_samples(images: int, samples: int = 500, seed: int = 0) -> np.ndarray:
    """
    Returns:
        (1 + samples, images): how often each image is in a sample that is drawn with replacement. The first sample is
        the images themselves, of one image the only one: there is no other sample of it. The same arguments give the
        same samples, so that figures of two models are paired.
    """
    whole = np.ones((1, images), dtype=int)
    if images == 1:
        return whole
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)
    return np.concatenate([whole, draws])


def ratio_of_samples(first: np.ndarray, kept: np.ndarray) -> Interval:
    """
    The share of a model's figure that another keeps.

    Args:
        first, kept: (1 + samples,) the two models' figures on :func:`draw_samples`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(first > 0, kept / first, np.nan)
    if np.isnan(shares[1:]).all():
        return Interval(float(shares[0]), np.nan, np.nan)
    low, high = np.nanpercentile(shares[1:], [2.5, 97.5])
    return Interval(float(shares[0]), float(low), float(high))


def ratio_of_medians(slow: np.ndarray, fast: np.ndarray, resamples: int = 2000, seed: int = 0) -> Interval:
    """
    How many times faster ``fast`` is, with a bootstrap interval over images.

    Args:
        slow, fast: (images,) milliseconds, in the same order of images.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    draws = np.random.default_rng(seed).integers(len(slow), size=(resamples, len(slow)))
    ratios = np.median(slow[draws], axis=1) / np.median(fast[draws], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(np.median(slow) / np.median(fast)), float(low), float(high))
