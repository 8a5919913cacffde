"""
Calibration: the maps of :mod:`hourglass.reduction.calibrated` in closed form, from a few images without labels. No
weight is trained.

The error of restoring, e = y - x - U (c' - c), where y is the blocks' output for x on the full map, is regressed on
d = x - U c, or on d, x and the update U (c' - c), by ridge regression. Form, ridge and rank are those with the least
squared error on images that were left out (cross-validation over images); of ridges that hardly differ the largest,
as it errs least on images of other kinds. An image counts as known where its reduced tokens, whitened by those of the
others, are no farther out than the farthest of those that were left out.

Letters: n tokens, p features, C channels.
"""

import contextlib
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import product
from operator import add
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from tqdm import tqdm

from hourglass.contexts import evaluating, without_autocast
from hourglass.encoders.calibration import Calibration, describe_encoder, sample_weights
from hourglass.encoders.expedite import expedite
from hourglass.encoders.plan import Plan
from hourglass.encoders.registry import find_encoder
from hourglass.encoders.sharing import unmodified
from hourglass.encoders.visiting import middles_of, visiting
from hourglass.errors import InputError
from hourglass.reduction import SkipBlocks
from hourglass.reduction.calibrated import check_restoring, sample
from hourglass.reduction.reducer import Place, Reducer, Reduction, refine
from hourglass.reduction.windows import map_size

# Of an image, evenly spaced.
TOKENS = 4096
FOLDS = 4
# Times the features' own variances.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
# Of the channels. Two products of C / 4 columns are half of one of C.
RANKS = (1 / 16, 1 / 8, 1 / 4, 1)
# What a lower rank, and a larger ridge, may add to the squared error that is left.
SLACK, RIDGE_SLACK = 0.005, 0.1
# Added to the second moments of reduced tokens, times their mean, for whitening.
DAMPING = 0.1
# Plans that are calibrated at a time: each of ViTDet-B's takes 170 MB.
TOGETHER = 6
FORMS = {"detail": ("detail",), "full": ("detail", "tokens", "update")}


def calibrate(model: nn.Module, plan: Plan, images: Iterable[list[dict[str, Any]]], about: str = "") -> Calibration:
    """
    Fit a correction of a plan's restoring, for ``plan.calibrated(...)``.

    Args:
        model: as for :func:`hourglass.expedite`, with its weights loaded.
        plan: with a reducer of one smaller map and ``restore_mode="update"``, or with
            :class:`~hourglass.reduction.LinearBlocks`.
        images: batches of the model's inputs, at least two. Labels are not read.
        about: a description of the images, such as the name of their data set.

    Returns:
        the calibration, for this plan, encoder and weights.

    Raises:
        InputError: for a plan that cannot be calibrated, and for less than two batches.
    """
    return calibrate_plans(model, [plan], images, about)[0]


def calibrate_plans(
    model: nn.Module, plans: Sequence[Plan], images: Iterable[list[dict[str, Any]]], about: str = ""
) -> list[Calibration]:
    """As :func:`calibrate`, for several plans: the encoder's blocks run on the full map once for all of them."""
    for plan in plans:
        if plan.reducer is None or plan.published:
            raise InputError(f"calibration needs a plan with a reducer that is not run as published, got {plan!r}")
    plans = [plan.uncalibrated() for plan in plans]
    views = [expedite(model, plan.to_be_calibrated()) for plan in plans]
    middles = [middles_of(view) for view in views]
    recorders = [Recorder(plan.proportional) for plan in plans]
    lowest = min(min(of_plan) for of_plan in middles)
    highest = max(start + len(middle.blocks) for of_plan in middles for start, middle in of_plan.items())
    count = 0

    def visit(first: int, tokens: Tensor, blocks: Sequence[nn.Module], _: Reducer) -> Tensor:
        maps = [tokens]
        for block in blocks:
            maps.append(block(maps[-1], Place(map_size(tokens))))
        for recorder, of_plan in zip(recorders, middles):
            recorder.fold = count % FOLDS
            for number, middle in of_plan.items():
                start = number - lowest - first
                if 0 <= start < len(blocks):
                    outcome = maps[start], maps[start + len(middle.blocks)]
                    recorder.record(middle.first, *outcome, middle.blocks, middle.reducer)
        return maps[-1]

    with contextlib.ExitStack() as stack:
        for view in views:
            stack.enter_context(evaluating(view))
        run = stack.enter_context(visiting(expedite(model, Plan(SkipBlocks(), lowest, highest)), visit))
        quiet = not comm.is_main_process()
        for inputs in tqdm(images, desc="calibrating", unit="image", dynamic_ncols=True, disable=quiet):
            run(inputs)
            count += 1
    if count < 2:
        raise InputError(f"calibration needs at least 2 images, got {count}")
    calibrations = []
    for plan, view, recorder in zip(plans, views, recorders):
        fits = {first: fit(moments) for first, moments in recorder.moments.items()}
        calibrations.append(to_calibration(fits, view, plan, count, about))
    return calibrations


def to_calibration(fits: "dict[int, Fit]", view: nn.Module, plan: Plan, count: int, about: str = "") -> Calibration:
    """
    Args:
        fits: number of a stage's first block -> what is fitted to it.
        view: the model, expedited.
        plan: as it was fitted.
        count, about: how many images it was fitted to, and what these are.
    """
    encoder = unmodified(find_encoder(view)[1])
    return Calibration(
        {first: fitted.tensors for first, fitted in fits.items()},
        plan.describe(),
        describe_encoder(encoder),
        sample_weights(encoder),
        {
            "images": count,
            "about": about,
            "stages": [
                {
                    "form": fitted.form,
                    "ridge": fitted.ridge,
                    "rank": fitted.rank,
                    "left": fitted.remaining,
                    "left without": fitted.before,
                }
                for fitted in fits.values()
            ],
        },
    )


class Recorder:
    """
    Runs a stage's planned blocks on the full map and on fewer tokens, and records the moments of the difference.

    Args:
        proportional: see :class:`~hourglass.Plan`.
        folds: how many parts the images are kept in.

    Attributes:
        moments: number of the stage's first block -> those of each fold.
        fold: that the next image belongs to.
    """

    def __init__(self, proportional: bool = True, folds: int = FOLDS):
        self.proportional, self.folds = proportional, folds
        self.moments: dict[int, list[Moments]] = {}
        self.fold = 0

    def __call__(self, first: int, tokens: Tensor, blocks: Sequence[nn.Module], reducer: Reducer) -> Tensor:
        output = tokens
        for block in blocks:
            output = block(output, Place(map_size(tokens)))
        self.record(first, tokens, output, blocks, reducer)
        return output

    def record(self, first: int, tokens: Tensor, output: Tensor, blocks: Sequence[nn.Module], reducer: Reducer) -> None:
        """
        Record the error of restoring for one map.

        Args:
            first: number of the stage's first block among the plan's.
            tokens: (B, H, W, C), the blocks' input.
            output: (B, H, W, C), their output on the full map.
            blocks, reducer: run on fewer tokens.
        """
        if first not in self.moments:
            check_restoring(reducer, map_size(tokens), tokens.new_zeros(tokens.shape[-1]))
            self.moments[first] = [Moments() for _ in range(self.folds)]
        reduction = reducer(tokens)
        refined = refine(reduction, map_size(tokens), blocks, self.proportional)
        self.moments[first][self.fold].observe(tokens, reduction, refined, output)
        if refined.numel() > 0:
            self.moments[first][self.fold].observe_images(reduction.tokens)


def detail_of(reduction: Reduction) -> Tensor:
    """(B, H, W, C), d = x - U c: what the reduced tokens miss of each token."""
    return reduction.restore(torch.zeros_like(reduction.tokens))


class Moments:
    """
    Sums over tokens, in float64.

    Args:
        tokens: of an image, at most so many are seen.

    Attributes:
        gram: (p + 1, p + 1) products of features, of which the last is 1.
        cross: (p + 1, C) products of features and targets.
        square: of targets, squared, over all channels.
        output_sum: (C,) of the blocks' output.
        output_square: of that, squared, over all channels.
        count: of tokens.
    """

    def __init__(self, tokens: int = TOKENS) -> None:
        self.tokens = tokens
        #: (C, C), second moments of an image's reduced tokens.
        self.images: list[Tensor] = []
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.square = 0.0
        self.output_sum: Tensor | float = 0.0
        self.output_square = 0.0
        self.count = 0

    def observe(
        self, tokens: Tensor, reduction: Reduction, refined: Tensor, output: Tensor, detail: Tensor | None = None
    ) -> Tensor:
        """
        Record the error of restoring.

        Args:
            tokens: (B, H, W, C), the blocks' input.
            reduction: of these tokens.
            refined: (B, h, w, C), its tokens after the blocks.
            output: (B, H, W, C), the blocks' output on the full map.
            detail: (B, H, W, C), d, if it is known already.

        Returns:
            (B, H, W, C), the restored map.
        """
        restored = reduction.restore(refined)
        features = [tokens]
        if refined.numel() > 0:
            features = [detail_of(reduction) if detail is None else detail, tokens, restored - tokens]
        self.add(features, output - restored, output)
        return restored

    def observe_images(self, reduced: Tensor) -> None:
        """Record the second moments of each image's reduced tokens (B, h, w, C)."""
        with without_autocast(reduced):
            for rows in sample(reduced).float():
                self.images.append((rows.T @ rows / len(rows)).cpu())

    def add(self, features: list[Tensor], target: Tensor, output: Tensor) -> None:
        """Add features, target and the blocks' output, (B, H, W, C) each, to the sums."""
        step = max(1, target[..., 0].numel() // self.tokens)
        rows = [values.flatten(0, 2)[::step].float() for values in (*features, target, output)]
        ones = torch.ones_like(rows[0][:, :1])
        stacked, target, output = torch.cat([*rows[:-2], ones], dim=1), rows[-2], rows[-1]
        # Products of what is left of the means, which are added in float64: beside large ones small variances are lost.
        shift, target_shift = stacked.mean(0), target.mean(0)
        shift[-1] = 0
        shifted = stacked - shift
        with without_autocast(shifted):
            gram, cross = ((shifted.T @ rest).double().cpu() for rest in (shifted, target - target_shift))
        shift, target_shift = shift.double().cpu(), target_shift.double().cpu()
        sums, target_sums = gram[-1].clone(), cross[-1].clone()
        total = sums + sums[-1] * shift
        self.gram = self.gram + gram.addr_(total, shift).addr_(shift, sums)
        self.cross = self.cross + cross.addr_(total, target_shift).addr_(shift, target_sums)
        self.square += float(target.double().square().sum())
        self.output_sum = self.output_sum + output.double().sum(0).cpu()
        self.output_square += float(output.double().square().sum())
        self.count += len(target)

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(self.tokens)
        for name in vars(self).keys() - {"tokens"}:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def variance(self) -> float:
        """Of the blocks' output, times the number of tokens."""
        assert isinstance(self.output_sum, Tensor)
        return self.output_square - float(self.output_sum.square().sum()) / self.count

    def select(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Gram matrix and cross products of some of the features."""
        assert isinstance(self.gram, Tensor) and isinstance(self.cross, Tensor)
        return self.gram[columns][:, columns], self.cross[columns]


class Fit(NamedTuple):
    """
    Attributes:
        tensors: see :class:`~hourglass.reduction.calibrated.Correction`.
        form, ridge, rank: with the least error.
        before, remaining: squared error after restoring, as a share of the variance of the blocks' output: without and
            with the correction, on images that it was not fitted to.
        weights: (p + 1, C), of the form's features and the constant.
    """

    tensors: dict[str, Tensor]
    form: str
    ridge: float
    rank: int
    before: float
    remaining: float
    weights: Tensor

    def remaining_on(self, images: Sequence[Moments]) -> float:
        """
        The squared error after correction on other images, as a share of the variance of the blocks' output there.

        Args:
            images: the moments of each.
        """
        error = 0.0
        for moments in images:
            gram, cross = moments.select(_columns(self.form, _channels(moments)))
            error += moments.square + _change(self.share_of(moments) * self.weights, gram, cross)
        return error / reduce(add, images).variance

    def share_of(self, image: Moments) -> float:
        """Share of the correction that an image gets (:class:`~hourglass.reduction.calibrated.Guard`), from 0 to 1."""
        if "whitening" not in self.tensors:
            return 1.0
        (moments,), root = image.images, self.tensors["whitening"]
        return min(1.0, max(0.0, 2 - float((root * (moments @ root)).sum())))


def fit(
    folds: list[Moments],
    forms: Sequence[str] = tuple(FORMS),
    ridges: Sequence[float] = RIDGES,
    shares: Sequence[float] = RANKS,
    guard: bool = True,
) -> Fit:
    """
    The correction with the least error in cross-validation, of some forms and ridges, in ascending order; of some
    ranks, as shares of the channels and in ascending order, the lowest that hardly adds to the error of the last.

    Args:
        guard: whether images unlike those of ``folds`` are corrected less.

    Raises:
        InputError: for maps that are not finite.
    """
    folds = [fold for fold in folds if fold.count]
    total = reduce(add, folds)
    channels = _channels(total)
    assert isinstance(total.gram, Tensor) and isinstance(total.cross, Tensor)
    if not (torch.isfinite(total.gram).all() and torch.isfinite(total.cross).all()):
        raise InputError("the maps before and after the plan's blocks must be finite, got nan or inf in some of them")
    linear = len(total.cross) == channels + 1
    forms = ("linear",) if linear else forms
    ranks = [max(1, round(share * channels)) for share in shares]
    errors = {key: 0.0 for key in product(forms, ridges, ranks)}
    for i, held_out in enumerate(folds):
        training = reduce(add, [fold for j, fold in enumerate(folds) if j != i])
        for form, ridge in product(forms, ridges):
            columns = _columns(form, channels)
            solution = _solve(training, columns, ridge)
            gram, cross = held_out.select(columns)
            for rank in ranks:
                errors[form, ridge, rank] += held_out.square + _change(solution.with_constant(rank), gram, cross)
    full = {key: error for key, error in errors.items() if key[2] == ranks[-1]}
    form, ridge, _ = min(full, key=full.__getitem__)
    enough = full[form, ridge, ranks[-1]] * (1 + RIDGE_SLACK) + 1e-7 * total.square
    ridge = max(candidate for candidate in ridges if full[form, candidate, ranks[-1]] <= enough)
    most = full[form, ridge, ranks[-1]] * (1 + SLACK) + 1e-7 * total.square  # an exact fit leaves rounding
    rank = next(rank for rank in ranks if errors[form, ridge, rank] <= most)
    solution = _solve(total, _columns(form, channels), ridge)
    tensors = _tensors(form, solution, rank)
    if guard and not linear:
        tensors["whitening"] = _whitening([fold.images for fold in folds])
    variance = max(total.variance, 1e-30)
    remaining = max(0.0, errors[form, ridge, rank])
    return Fit(tensors, form, ridge, rank, total.square / variance, remaining / variance, solution.with_constant(rank))


def _whitening(folds: list[list[Tensor]]) -> Tensor:
    """
    (C, C): the sum of squares of reduced tokens times it is 1, in the mean over an image, for the farthest of the
    images when those of its fold are left out. From the second moments of each image.
    """

    def inverse_root(images: list[Tensor]) -> Tensor:
        moments = torch.stack(images).double().mean(0)
        values, vectors = torch.linalg.eigh(moments)
        return vectors * (values.clamp(min=0) + DAMPING * values.mean() + 1e-30).rsqrt()

    farthest = 0.0
    for i, held_out in enumerate(folds):
        training = [image for j, fold in enumerate(folds) if j != i for image in fold]
        if training:
            root = inverse_root(training)
            farthest = max(farthest, *(float((root * (image.double() @ root)).sum()) for image in held_out))
    root = inverse_root([image for fold in folds for image in fold])
    return (root / max(farthest, 1e-30) ** 0.5).float()


def _channels(moments: Moments) -> int:
    assert isinstance(moments.cross, Tensor)
    return moments.cross.shape[1]


def _change(weights: Tensor, gram: Tensor, cross: Tensor) -> float:
    """Of the squared error, by predicting the target with weights (p + 1, C) of the features and the constant."""
    return float((weights * (gram @ weights)).sum() - 2 * (weights * cross).sum())


def _columns(form: str, channels: int) -> Tensor:
    """Of the features detail, tokens and update, and of the constant, those of a form."""
    if form == "linear":
        return torch.arange(channels + 1)
    number = len(FORMS[form]) * channels
    return torch.cat([torch.arange(number), torch.tensor([3 * channels])])


class _Solution(NamedTuple):
    """
    Attributes:
        weights: (p, C).
        basis: (C, C), the principal directions of what they predict, the first one first: weights that are projected
            on some are reduced-rank regression.
        means: (p,) and (C,), of features and targets.
    """

    weights: Tensor
    basis: Tensor
    means: tuple[Tensor, Tensor]

    def of_rank(self, rank: int) -> Tensor:
        basis = self.basis[:, :rank]
        return self.weights if rank == len(self.basis) else self.weights @ basis @ basis.T

    def with_constant(self, rank: int) -> Tensor:
        """(p + 1, C)"""
        weights = self.of_rank(rank)
        return torch.cat([weights, (self.means[1] - self.means[0] @ weights)[None]])


def _solve(moments: Moments, columns: Tensor, ridge: float) -> _Solution:
    """Ridge regression with a free constant."""
    gram, cross = moments.select(columns)
    mean = gram[-1] / moments.count  # of the features; that of the constant is 1
    centred = gram - moments.count * torch.outer(mean, mean)
    variances = centred.diagonal().clamp(min=0)
    # A feature without variance has nothing to say: it gets no weight.
    damping = ridge * variances + 1e-9 * variances.mean() + 1e-30
    of_cross = cross - torch.outer(mean, cross[-1])
    factor = torch.linalg.cholesky(centred[:-1, :-1] + torch.diag(damping[:-1]))
    weights = torch.cholesky_solve(of_cross[:-1], factor)
    predicted = weights.T @ centred[:-1, :-1] @ weights
    basis = torch.linalg.eigh(predicted).eigenvectors.flip(1)
    return _Solution(weights, basis, (mean[:-1], cross[-1] / moments.count))


def _tensors(form: str, solution: _Solution, rank: int) -> dict[str, Tensor]:
    """
    Weights of a form's features as the maps of tokens, of reduced and of refined ones: with d = x - U c, the update
    U (c' - c), and U mixing tokens,

        d D + x T + U (c' - c) R = x (D + T) - U c (D + R) + U c' R.
    """
    constant = solution.with_constant(rank)[-1]
    parts = dict(zip(FORMS.get(form, ("tokens",)), solution.weights.split(len(constant))))
    zero = torch.zeros_like(solution.basis)
    of_detail, of_tokens, of_update = (parts.get(name, zero) for name in FORMS["full"])
    maps = {"tokens": of_detail + of_tokens}
    if form != "linear":
        maps["reduced"] = -(of_detail + of_update)
    if form == "full":
        maps["refined"] = of_update
    if rank < len(constant):
        basis = solution.basis[:, :rank]
        maps = {name: value @ basis for name, value in maps.items()}
        maps["last"] = basis.T
    return {name: value.float().contiguous() for name, value in {**maps, "constant": constant}.items()}
