"""
Estimates of the accuracy that a plan keeps, from labels and from agreement. Labels are unbiased but noisy. Agreement
distinguishes similar plans, but a loss of it is not yet one against labels: the first outputs that change are those
that the model is least sure of, where the other answer is right as often. So losses are discounted: small ones count
by their square, the loss of everything in full. The slope, the odds of a loss against labels over those of a discounted
loss of agreement, differs from model to model: it is learned from the plans that ran on the same images.
"""

from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np

from hourglass.errors import InputError
from hourglass.evaluation.agreement import SCORE
from hourglass.search.measured import Result

# Losses of agreement far below it count by their square, far above it linearly.
KNEE = 0.2
# Of a discounted loss, what is lost against labels, before any are seen: 0.2 to 0.8 for boxes and masks of the
# drawn demo and of nuclei.
SLOPE, SLOPE_DEVIATION = 0.6, 0.35
# Labels of few images may even gain: a slope of 0 or less would promise that nothing can be lost.
LEAST_SLOPE = 0.01
# How far a plan's own slope lies from that of all, at least.
SCATTER = 0.15
# One-sided.
CONFIDENCE = 0.95

Share = TypeVar("Share", float, np.ndarray)


class Slope(NamedTuple):
    """
    The odds of a loss against labels over those of a discounted loss of agreement: for small losses their ratio, and
    where all of the agreement is lost, all is lost.

    Attributes:
        samples: (samples,) on bootstrap samples of the images, or (1,) where they do not differ.
        deviation: standard deviation of its error from other sources.
    """

    samples: np.ndarray
    deviation: float

    def settled(self) -> "Slope":
        """The slope on other images than those that it was learned from: the samples' variance becomes deviation."""
        drawn = float(np.nanvar(self.samples[1:])) if len(self.samples) > 2 else 0.0
        return Slope(self.samples[:1], (self.deviation**2 + drawn) ** 0.5)

    def loss(self, lost: np.ndarray) -> tuple[np.ndarray, float]:
        """
        Args:
            lost: of agreement, discounted, (samples,).

        Returns:
            the loss against labels, (samples,), and the standard deviation of its error from other sources.
        """
        slopes = np.maximum(self.samples if len(self.samples) == len(lost) else self.samples[:1], LEAST_SLOPE)
        scales = 1 + (slopes - 1) * lost
        return slopes * lost / scales, self.deviation * float(lost[0] * (1 - lost[0]) / scales[0] ** 2)


PRIOR = Slope(np.array([SLOPE]), SLOPE_DEVIATION)


def learn_slopes(results: Iterable[Result]) -> dict[str, Slope]:
    """
    Learn the slope of each figure from plans that ran on the same images: least squares through the origin, on the
    images and on each bootstrap sample of them, combined with the prior by their variances.

    Returns:
        figure -> slope, for the figures with labels.
    """
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for result in results:
        known = _losses(result)
        for figure, labelled in result.labelled.items():
            lost = known.get(figure)
            if lost is not None and len(labelled) == len(lost) > 2 and np.isfinite(labelled[0]):
                pairs.setdefault(figure, []).append((lost, 1 - labelled))
    return {figure: _learn(losses) for figure, losses in pairs.items()}


def _learn(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Slope:
    of_agreement, of_labels = (np.stack(losses) for losses in zip(*pairs))
    # The odds' ratio as a straight line, without a division.
    lost, lost_of_labels = of_agreement * (1 - of_labels), of_labels * (1 - of_agreement)
    squares = (lost**2).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = np.where(squares > 0, (lost * lost_of_labels).sum(0) / squares, np.nan)
    variance = float(np.nanvar(samples[1:])) if np.isfinite(samples[1:]).any() else np.inf
    if not np.isfinite(samples[0]) or not np.isfinite(variance):
        return PRIOR
    weight = SLOPE_DEVIATION**2 / (SLOPE_DEVIATION**2 + variance)
    residuals = lost_of_labels - samples * lost
    excess = float((residuals[:, 0] ** 2 - np.nanvar(residuals[:, 1:], axis=1)).sum() / squares[0])
    of_prior = (1 - weight) * SLOPE_DEVIATION
    deviation = (of_prior**2 + max(excess, SCATTER**2)) ** 0.5
    return Slope(weight * np.where(np.isfinite(samples), samples, samples[0]) + (1 - weight) * SLOPE, deviation)


def estimate(result: Result, slopes: dict[str, Slope] | None = None) -> tuple[float, float]:
    """
    Estimate the share that a plan keeps of the figure that loses most. For each figure two estimates are weighted by
    the inverse of their variances: the share that is kept against labels, and what agreement says of it by its slope.

    Args:
        result: of the plan.
        slopes: figure -> slope; the prior where there is none.

    Returns:
        the share, and its one-sided 95 % lower bound, each the least over the figures that count.

    Raises:
        InputError: for a model that gave nothing to compare, or found nothing.
    """
    if not result.agreement:
        raise InputError("the model gives no boxes, masks, panoptic segments or classes of pixels to rank plans by")
    estimates = []
    losses = _losses(result)
    for figure in counted(result):
        slope = (slopes or {}).get(figure, PRIOR)
        loss, unsure = slope.loss(losses[figure])
        kept = 1 - loss
        labelled = result.labelled.get(figure)
        if labelled is not None and len(labelled) == len(kept) > 2 and np.isfinite(labelled[0]):
            weights = 1 / np.maximum([_variance(kept) + unsure**2, _variance(labelled)], 1e-8)
            of_agreement, of_labels = weights / weights.sum()
            kept, unsure = of_agreement * kept + of_labels * labelled, of_agreement * unsure
        deviation = (_variance(kept) + unsure**2) ** 0.5
        estimates.append((float(kept[0]), float(kept[0]) - NormalDist().inv_cdf(CONFIDENCE) * deviation))
    if not estimates:
        raise InputError(f"the model finds nothing with a score over {SCORE} in these images that a plan could lose")
    return min(mean for mean, _ in estimates), min(lower for _, lower in estimates)


def counted(result: Result) -> list[str]:
    """
    The figures that a plan is judged by: with labels, those that they measure, so that nothing is asked of the boxes of
    a model that is evaluated by its panoptic segments.
    """
    known = list(_losses(result))
    measured = [figure for figure in result.labelled if figure in known and np.isfinite(result.labelled[figure][0])]
    return measured or known


def discount(lost: Share) -> Share:
    """A share of agreement that is lost, as far as labels notice: convex, from 0 to 1."""
    return (1 + KNEE) * lost**2 / (lost + KNEE)


def _losses(result: Result) -> dict[str, np.ndarray]:
    """Figure -> what is lost of its agreement, discounted, (samples,); without those that have none."""
    known = {figure: samples for figure, samples in result.agreement.items() if not np.isnan(samples[0])}
    return {figure: discount(1 - samples / 100) for figure, samples in known.items()}


def _variance(samples: np.ndarray) -> float:
    return float(np.nanvar(samples[1:])) if len(samples) > 2 else 0.0
