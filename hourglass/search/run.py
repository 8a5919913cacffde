"""
A search, phase after phase: errors and times of blocks, from which every plan is predicted; rounds of plans that close
in on the goal; a guard; and images that nothing was chosen on.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from hourglass.encoders import Plan, expedite, find_encoder
from hourglass.encoders.calibration import Calibration
from hourglass.errors import InputError
from hourglass.evaluation.agreement import recording
from hourglass.evaluation.compare import Comparison, Subject, compare
from hourglass.evaluation.journal import members
from hourglass.fitting import TOGETHER, calibrate_plans
from hourglass.reduction import SkipBlocks
from hourglass.search.estimate import Slope, estimate, learn_slopes
from hourglass.search.front import Candidate, enumerate_plans, make_pool
from hourglass.search.goal import Goal
from hourglass.search.latency import measure_latency
from hourglass.search.measured import Measured, Result
from hourglass.search.options import KEYS
from hourglass.search.trace import Traced, measure_errors, trace

# Plans that run in each round.
ROUNDS = (3, 2, 2)
# Errors of the first ones, over the loss that is asked for: models differ by a factor of ten in what an error costs.
ERRORS = (0.5, 1.5, 4.0)
# Between the speeds of plans that run next, where all of those before reached the goal.
STEP = 1.25
BASE = "fast attention"


class Inputs(Protocol):
    """What a model is called with, one image after the other; can be gone through again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[dict[str, Any]]]: ...


class Images(NamedTuple):
    """
    What the model is called with, in three sets that share no image.

    Attributes:
        fit: plans are calibrated to, and errors and times of blocks are of.
        rank: plans are ranked on.
        check: nothing is chosen on.
        about: what they are, for people.
    """

    fit: Inputs
    rank: Inputs
    check: Inputs
    about: str


class Row(NamedTuple):
    """
    A plan that ran.

    Attributes:
        name: for people.
        plan: without its calibration.
        predicted: how many times as fast as fast attention alone, from the times of blocks.
        result: on some images.
        images: how many these are.
        kept, lower: what it keeps, see :func:`~hourglass.search.estimate.estimate`.
        verdict: why it is not the answer, where a better one is known.
    """

    name: str
    plan: Plan
    predicted: float
    result: Result
    images: int
    kept: float
    lower: float
    verdict: str = ""


class Ran(NamedTuple):
    """
    A candidate that ran.

    Attributes:
        candidate: as it was enumerated.
        plan: it, without its calibration.
        predicted: see :class:`Row`.
        result: on the images of the ranking.
    """

    candidate: Candidate
    plan: Plan
    predicted: float
    result: Result


class Outcome(NamedTuple):
    """
    What a search found.

    Attributes:
        plan: the answer, calibrated.
        reached: whether it reaches the goal.
        why: in words.
        rows: the plans that ran, the slowest first.
        checked: name -> a row on the images of the check: of the answer, and of its controls.
        slopes: figure -> what a loss of agreement costs against labels; empty without labels.
    """

    plan: Plan
    reached: bool
    why: str
    rows: list[Row]
    checked: dict[str, Row]
    slopes: dict[str, Slope] = {}


class Search:
    """
    Args:
        model: its weights loaded, in evaluation mode.
        images: see :class:`Images`.
        goal: what is asked for.
        measured: what is known, and where to write what is measured.
        build_evaluator: name of a model -> what evaluates it on the labels of the images; None: there are none.
        device: "cpu" or "cuda".
        dtype: of the forward passes, by autocast.
        log: takes a line for the user.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        goal: Goal,
        measured: Measured,
        build_evaluator: Callable[[str], DatasetEvaluator] | None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        log: Callable[[str], None] = print,
    ):
        self.model, self.images, self.goal, self.measured = model, images, goal, measured
        self.build_evaluator = build_evaluator if goal.labels == "auto" else None
        self.device, self.dtype, self.log = device, dtype, log
        self._calibrations: dict[str, Calibration] = {}
        self._slopes: dict[str, Slope] = {}
        self._ran: list[Ran] = []

    def run(self) -> Outcome:
        """
        Raises:
            InputError: for a model that cannot be searched, and for too few images.
        """
        for name in ("fit", "rank", "check"):
            if len(getattr(self.images, name)) < 2:
                raise InputError(f"--search needs at least 2 images to {name}, got {len(getattr(self.images, name))}")
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            traced = trace(self.model, self.images.fit)
            errors = self.measured.errors(lambda: measure_errors(traced))
            last = next(inputs for i, inputs in enumerate(self.images.fit, start=1) if i == len(traced.maps[0]))
            latency = self.measured.latency(lambda: measure_latency(traced, self.model, last, self.device))
        plans = enumerate_plans(traced, errors, latency)
        pool = make_pool(traced, plans, latency.encoder / (self.goal.speed or 1.0))
        kinds = ", ".join(f"{len(front)} {kind}" for kind, front in pool.items()) or "none"
        self.log(f"{len(plans)} plans are predicted; best of their kind for their time: {kinds}")
        if not pool:
            fastest = latency.encoder / min(candidate.time for candidate in plans)
            return self._no_plan(f"the fastest plan is predicted to be at {fastest:.2f}x of fast attention alone")
        for number, most in enumerate(ROUNDS, start=1):
            promising = self._promising(traced, pool, latency.encoder, most)
            if promising:
                self._run(traced, latency.encoder, promising, number)
        return self._choose(self._rows())

    # --- running plans --------------------------------------------------------------------------------------------

    def _run(self, traced: Traced, encoder: float, candidates: list[Candidate], number: int) -> None:
        """A round: run plans on the images of the ranking."""
        plans = {key(candidate.plan(traced)): candidate for candidate in candidates}
        results = self._measure(
            [candidate.plan(traced) for candidate in candidates], self.images.rank, f"rank {len(self.images.rank)}"
        )
        for name, candidate in plans.items():
            self._ran.append(Ran(candidate, candidate.plan(traced), encoder / candidate.time, results[name]))
        self.log(f"round {number}, {len(plans)} plans on {len(self.images.rank)} images:")
        for row in self._rows():
            verdict = f"  ({row.verdict})" if row.verdict else ""
            if key(row.plan) in plans:
                self.log(f"  {row.result.speed:.2f}x, keeps about {100 * row.kept:.1f} %  {row.name}{verdict}")

    def _rows(self) -> list[Row]:
        """The plans that ran, the slowest first; slopes are those that they show."""
        self._slopes = learn_slopes(each.result for each in self._ran)
        images = len(self.images.rank)
        rows = [self._row(each.plan, each.predicted, each.result, images, self._slopes) for each in self._ran]
        rows.sort(key=lambda row: row.result.speed)
        best, marked = -math.inf, []
        for row in reversed(rows):
            marked.append(row._replace(verdict="" if row.kept > best else "a faster one keeps more"))
            best = max(best, row.kept)
        return marked[::-1]

    def _row(
        self, plan: Plan, predicted: float, result: Result, images: int, slopes: dict[str, Slope] | None = None
    ) -> Row:
        kept, lower = estimate(result, slopes)
        return Row(describe(plan), plan, predicted, result, images, kept, lower)

    def _calibrate(self, plans: list[Plan]) -> None:
        """Calibrate those that can be and are not yet."""
        fitted = [plan for plan in plans if plan.reducer is not None and type(plan.reducer) is not SkipBlocks]
        missing = [plan for plan in fitted if key(plan) not in self._calibrations]
        for start in range(0, len(missing), TOGETHER):
            part = missing[start : start + TOGETHER]
            calibrations = calibrate_plans(self.model, part, self.images.fit, self.images.about)
            self._calibrations |= {key(plan): calibration for plan, calibration in zip(part, calibrations)}

    def _calibrated(self, plan: Plan) -> Plan:
        self._calibrate([plan])
        calibration = self._calibrations.get(key(plan))
        return plan if calibration is None else plan.calibrated(calibration)

    def _measure(self, plans: list[Plan], images: Inputs, phase: str) -> dict[str, Result]:
        """:func:`key` of each plan -> its results on some images; those that are not known yet are measured."""
        labelled = f"{phase}, with labels"
        results = {key(plan): self.measured.result(labelled, key(plan)) for plan in plans}
        if self.build_evaluator is not None:
            phase = labelled
        else:  # outputs do not depend on labels
            known = {name: result._replace(labelled={}) for name, result in results.items() if result is not None}
            results = {name: known.get(name, self.measured.result(phase, name)) for name in results}
        missing = [plan for plan in plans if results[key(plan)] is None]
        if missing:
            self._calibrate(missing)
            measured = self._compare({key(plan): self._calibrated(plan) for plan in missing}, list(images), phase)
            self.measured.add(phase, measured)
            results |= measured
        return {name: result for name, result in results.items() if result is not None}

    def _compare(self, plans: dict[str, Plan], images: list[list[dict[str, Any]]], phase: str) -> dict[str, Result]:
        subjects = {}
        for name, plan in {BASE: Plan(attention="fast"), **plans}.items():
            labels = members(self.build_evaluator(describe(plan))) if self.build_evaluator is not None else []
            view = expedite(self.model, plan)
            subjects[name] = Subject(view, find_encoder(view)[1], recording(labels), counted=False)
        title = f"{phase.split()[0].rstrip(',')}ing {len(plans)} plans"
        comparison = compare(subjects, images, self.device, self.dtype, warmup=1, title=title)
        assert comparison is not None, "a search is of one process"
        return {
            name: Result(
                float(np.median(comparison.models[name].runs["encoder"])),
                comparison.speedup(name, "encoder").ratio,
                comparison.agreement[name],
                _labelled(comparison, name),
            )
            for name in plans
        }

    # --- choosing -------------------------------------------------------------------------------------------------

    def _promising(
        self, traced: Traced, pool: dict[str, list[Candidate]], encoder: float, most: int
    ) -> list[Candidate]:
        """
        The plans to run next, at most ``most`` of them, the slowest first. At first they have errors about the loss
        that is asked for, and are of several kinds. With a goal of `keep`, those after them are between the fastest
        plan that reached it and the next faster one, which did not, at even steps of the speed; with one of `speed`,
        they are those that are predicted to lose least.
        """
        if not self._ran:
            return self._first(traced, pool)
        done = [ran.candidate for ran in self._ran]
        losses = {plan: loss for plan, loss in self._predict(traced, pool).items() if plan not in done}
        if self.goal.keep is None:
            chosen = sorted(losses, key=lambda candidate: losses[candidate])[:most]
            return sorted(chosen, key=lambda candidate: -candidate.time)
        reached = [plan.time for plan, (_, lower) in self._estimates().items() if lower >= self.goal.keep]
        slow = min(reached, default=encoder)
        fast = max((plan.time for plan in done if plan.time < slow), default=slow / STEP**most)
        levels = [slow * (fast / slow) ** (i / (most + 1)) for i in range(1, most + 2)]
        chosen = []
        for slowest, fastest in itertools.pairwise(levels):
            between = [plan for plan in losses if fastest < plan.time <= slowest]
            chosen += sorted(between, key=lambda candidate: losses[candidate])[:1]
        return chosen

    def _first(self, traced: Traced, pool: dict[str, list[Candidate]]) -> list[Candidate]:
        """The fastest plans of no more than some errors, if possible each of a kind of its own."""
        candidates = [candidate for front in pool.values() for candidate in front]
        least = min(candidate.error for candidate in candidates)
        unit = least / ERRORS[0] if self.goal.keep is None else 1 - self.goal.keep
        chosen: list[Candidate] = []
        for share in ERRORS:
            tried = {candidate.kind(traced) for candidate in chosen}
            within = [candidate for candidate in candidates if candidate.error <= max(share * unit, least)]
            fresh = [candidate for candidate in within if candidate.kind(traced) not in tried]
            chosen.append(min(fresh or within, key=lambda candidate: candidate.time))
        return sorted(set(chosen), key=lambda candidate: -candidate.time)

    def _estimates(self) -> dict[Candidate, tuple[float, float]]:
        """What each plan that ran keeps, see :func:`~hourglass.search.estimate.estimate`."""
        slopes = learn_slopes(ran.result for ran in self._ran)
        return {ran.candidate: estimate(ran.result, slopes) for ran in self._ran}

    def _predict(self, traced: Traced, pool: dict[str, list[Candidate]]) -> dict[Candidate, float]:
        """
        What each plan would lose or, with a goal of `keep`, its bound: a power of its error, times factors of its
        reducer, of its pooled keys and of its blocks, by a ridge regression of logarithms over the plans that ran.
        """
        candidates = [candidate for front in pool.values() for candidate in front]
        estimates = self._estimates()
        features = np.array([_features(traced, candidate) for candidate in (*estimates, *candidates)])
        losses = [1 - (kept if self.goal.keep is None else lower) for kept, lower in estimates.values()]
        # Before any ran: a square root, and factors of 1.
        system = np.concatenate([np.delete(np.eye(features.shape[1]), 1, axis=0), features[: len(losses)]])
        target = [0.5] + [0.0] * (features.shape[1] - 2) + [_log(loss, 2e-4) for loss in losses]
        power, *factors = np.linalg.lstsq(system, np.array(target), rcond=None)[0]
        predicted = np.exp(features[len(losses) :] @ [max(power, 0.1), *factors])
        return dict(zip(candidates, predicted.tolist()))

    def _choose(self, rows: list[Row]) -> Outcome:
        if self.goal.keep is None:
            assert self.goal.speed is not None
            enough = [row for row in rows if row.result.speed >= self.goal.speed] or rows[-1:]
            accepted = [max(enough, key=lambda row: row.kept)]
            reached = accepted[0].result.speed >= self.goal.speed
        else:
            accepted, reached = [], True
            for row in rows:  # a fixed sequence, from slow to fast, needs no correction for its many tests
                if row.lower >= self.goal.keep:
                    accepted.append(row)
                elif not row.verdict:
                    break
        checked: dict[str, Row] = {}
        while accepted:
            row = accepted.pop()
            checked = self._check(row)
            answer = checked[row.name]
            # Of all images: those of the check alone are too few to tell a plan from one that keeps half a point less.
            images = row.images + answer.images
            kept = (row.images * row.kept + answer.images * answer.kept) / images
            if self.goal.keep is None or kept >= self.goal.keep:
                why = self._explain(checked, reached)
                return Outcome(self._calibrated(row.plan), reached, why, rows, checked, self._slopes)
            self.log(
                f"{row.name} keeps about {100 * answer.kept:.1f} % on images that nothing was chosen on, and "
                f"{100 * kept:.1f} % with those: too little, the next slower plan"
            )
        return self._no_plan(f"no plan is sure to keep {self.goal.keep:g}", rows, checked)

    def _check(self, row: Row) -> dict[str, Row]:
        """The plan and its controls on images that nothing was chosen on."""
        plans = {row.name: row.plan}
        if row.plan.reducer is not None:
            plans["its blocks left out"] = row.plan.control()
            plans["an affine map in their place"] = row.plan.linear_control()
        results = self._measure(list(plans.values()), self.images.check, "check")
        number = len(self.images.check)
        self._slopes = {figure: slope.settled() for figure, slope in self._slopes.items()}
        rows = {}
        for name, plan in plans.items():
            # The slopes are of plans: a control changes maps in another way, and may lose more than any of them.
            slopes = self._slopes if name == row.name else None
            rows[name] = self._row(plan, row.predicted, results[key(plan)], number, slopes)._replace(name=name)
        return rows

    def _explain(self, checked: dict[str, Row], reached: bool) -> str:
        answer, *controls = checked.values()
        text = (
            f"{answer.name} keeps about {100 * answer.kept:.1f} % at {answer.result.speed:.2f}x on {answer.images} "
            "images that nothing was chosen on"
        )
        if not reached:
            text += f"; nothing is {self.goal.speed:g}x as fast"
        enough = answer.kept if self.goal.keep is None else self.goal.keep
        for row in controls:
            if row.kept >= enough:
                text += f"; with {row.name} the model keeps {100 * row.kept:.1f} %: it does not need these blocks"
        return text

    def _no_plan(self, why: str, rows: list[Row] | None = None, checked: dict[str, Row] | None = None) -> Outcome:
        text = f"{why}: fast attention alone, which changes nothing"
        return Outcome(Plan(attention="fast"), False, text, rows or [], checked or {}, self._slopes)


def _features(traced: Traced, candidate: Candidate) -> list[float]:
    """The logarithm of the error, 1, and whether a plan has each reducer, each number of pooled keys and each block."""
    reducers = sorted({type(option.reducer).__name__ for option in traced.options})
    own = None if candidate.option is None else type(traced.options[candidate.option].reducer).__name__
    blocks = (candidate.start <= block < candidate.stop for block in range(traced.depth))
    chosen = (*(own == name for name in reducers), *(candidate.keys == keys for keys in KEYS[1:]), *blocks)
    return [_log(candidate.error), 1.0, *map(float, chosen)]


def _log(value: float, least: float = 1e-9) -> float:
    return math.log(max(value, least))


def key(plan: Plan) -> str:
    """The plan without its calibration, as text."""
    return json.dumps(plan.uncalibrated().describe(), sort_keys=True)


def describe(plan: Plan) -> str:
    """A plan in a few words."""
    if plan.reducer is None:
        return f"keys of {plan.keys} x {plan.keys} tokens" if plan.keys > 1 else "fast attention"
    about = plan.reducer.describe()
    grid = " x ".join(f"{side:g}" for side in about.get("grid", ()))
    stop = "the last" if plan.stop is None else str(plan.stop - 1)
    keys = f", keys of {plan.keys} x {plan.keys}" if plan.keys > 1 else ""
    return f"{about['name']} {grid} a {plan.scope}, blocks {plan.start} to {stop}{keys}"


def _labelled(comparison: Comparison, name: str) -> dict[str, np.ndarray]:
    first, compared = comparison.models[BASE], comparison.models[name]
    shares = {}
    for figure, share in comparison.retention(name).items():
        if figure in first.samples and figure in compared.samples:
            with np.errstate(divide="ignore", invalid="ignore"):
                reference, kept = first.samples[figure], compared.samples[figure]
                shares[figure] = np.where(reference > 0, kept / reference, np.nan)
        else:  # an evaluator of the user's own, whose figures are not known on samples
            shares[figure] = np.array([share.ratio])
    return shares
