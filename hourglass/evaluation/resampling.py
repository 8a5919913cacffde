"""Intervals of figures by resampling the images (Efron's bootstrap)."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hourglass.errors import InputError


class Interval(NamedTuple):
    """A ratio and its 95 % interval; nan where there is none."""

    ratio: float
    low: float
    high: float


class Difference(NamedTuple):
    """A difference in percentage points and its 95 % interval; nan where there is none."""

    points: float
    low: float
    high: float


class Resampled(Protocol):
    """An evaluator that, after evaluation, gives its main figures for any sample of the images."""

    image_ids: Sequence[Any]

    def resample(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            weights: (samples, images), how often each of `image_ids` is in a sample.

        Returns:
            "task.figure" -> (samples,)
        """


class ResampledByClass(Resampled, Protocol):
    """An evaluator whose main figures are means over classes, and which gives them also by class."""

    def resample_classes(self, weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """
        Args:
            weights: as for ``resample``.

        Returns:
            "task.figure" -> class -> (samples,), nan where a sample has nothing of the class.
        """


def check_evaluated(dataset: str, chosen: Collection[Any], run: Collection[Any]) -> list[Any]:
    """
    The images to be evaluated, in order: ids that are numbers before those that are text.

    Raises:
        InputError: for those that no process has run.
    """
    unseen = [image_id for image_id in chosen if image_id not in run]
    if unseen:
        images = f"{len(unseen)} of the {len(chosen)} images of data set {dataset!r} to be evaluated"
        raise InputError(f"{images} were not run, such as {unseen[0]!r}: img_ids must be of those that were")
    return sorted(chosen, key=lambda image_id: (isinstance(image_id, str), image_id))


def name_classes(classes: dict[Any, str]) -> dict[Any, str]:
    """Id -> a name that no other class has: the id is added to names that several have."""
    names = list(classes.values())
    return {id: name if names.count(name) == 1 else f"{name} ({id})" for id, name in classes.items()}


def mean_of_classes(classes: Iterable[np.ndarray], samples: int) -> np.ndarray:
    """
    Args:
        classes: (samples,) of each class; nan where it has no figure.
        samples: how many there are.

    Returns:
        (samples,) the mean over those that have one; nan where none has.
    """
    total, present = np.zeros(samples), np.zeros(samples)
    for figures in classes:
        is_finite = ~np.isnan(figures)
        total += np.where(is_finite, figures, 0)
        present += is_finite
    return np.divide(total, present, out=np.full(samples, np.nan), where=present > 0)


def draw_samples(images: int, samples: int = 500, seed: int = 0) -> np.ndarray:
    """
    Returns:
        (1 + samples, images): how often each image is in a sample that is drawn with replacement. The first sample is
        the images themselves, of one image the only one: there is no other sample of it. The same arguments give the
        same samples, so that figures of two models are paired.
    """
    original = np.ones((1, images), dtype=int)
    if images == 1:
        return original
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)
    return np.concatenate([original, draws])


def ratio_of_samples(first: np.ndarray, kept: np.ndarray) -> Interval:
    """
    The ratio of another model's figure to a model's, with its interval.

    Args:
        first, kept: (1 + samples,) the two models' figures on :func:`draw_samples`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(first > 0, kept / first, np.nan)
    return Interval(float(shares[0]), *_interval(shares[1:]))


def interval_of_samples(samples: np.ndarray) -> Interval:
    """
    Args:
        samples: (1 + samples,) of a figure on :func:`draw_samples`.
    """
    return Interval(float(samples[0]), *(_interval(samples[1:]) if len(samples) > 1 else (np.nan, np.nan)))


def difference_of_samples(first: np.ndarray, kept: np.ndarray) -> Difference:
    """
    The difference of another model's figure and a model's in points, with its interval.

    Args:
        first, kept: (1 + samples,) the two models' figures on :func:`draw_samples`, in percent.
    """
    points = kept - first
    return Difference(float(points[0]), *_interval(points[1:]))


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The ends of the middle 95 % of those that are not nan; nan where all are."""
    if np.isnan(values).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


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
