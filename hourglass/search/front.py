"""Candidates: the plans on the Pareto front of predicted time and predicted error."""

from typing import NamedTuple

from hourglass.encoders import Plan
from hourglass.search.latency import Latency
from hourglass.search.options import KEYS
from hourglass.search.trace import Errors, Traced

# Errors beyond which a model finds little: a share of the maps' variance.
MOST = 0.15
# A kind of plan that has so many times the error of others, at the same time, is left out: what is lost for an error
# differs less than that between kinds.
FAR = 4.0


class Candidate(NamedTuple):
    """
    A plan, and what is predicted of it.

    Attributes:
        start, stop: the blocks; both 0 where all of them see every token.
        option: number of the option; None: no reducer.
        keys: see :class:`~hourglass.Plan`.
        time: of the encoder in ms.
        error: squared, see :class:`~hourglass.search.trace.Errors`.
    """

    start: int
    stop: int
    option: int | None
    keys: int
    time: float
    error: float

    def kind(self, traced: Traced) -> str:
        """The plan's reducer, and its pooled keys: each changes maps in a way of its own."""
        if self.option is None:
            return "keys"
        kind = type(traced.options[self.option].reducer).__name__
        return kind if self.keys == 1 else f"{kind}, keys of {self.keys} x {self.keys}"

    def plan(self, traced: Traced) -> Plan:
        """Not calibrated."""
        if self.option is None:
            return Plan(attention="fast", keys=self.keys)
        option = traced.options[self.option]
        return Plan(option.reducer, self.start, self.stop, scope=option.scope, keys=self.keys)


def enumerate_plans(traced: Traced, errors: Errors, latency: Latency) -> list[Candidate]:
    """All plans that the encoder can follow, with what is predicted of them."""
    candidates = []
    choices = [
        (start, stop, option)
        for option in range(len(traced.options))
        for start in range(traced.depth)
        for stop in range(start + 1, traced.depth + 1)
        if _is_measured(traced, errors, start, stop, option)
    ]
    for start, stop, option in [(0, 0, None), *choices]:
        for keys in KEYS:
            planned = range(start, stop)
            pooled = [block for block, pooled_keys in errors.pooled if pooled_keys == keys and block not in planned]
            if keys > 1 and not pooled:
                continue
            time = latency.of_plan(traced, start, stop, option, keys)
            error = errors.of_plan(traced, start, stop, option, keys)
            candidates.append(Candidate(start, stop, option, keys, time, error))
    return candidates


def _is_measured(traced: Traced, errors: Errors, start: int, stop: int, option: int) -> bool:
    parts = [(max(start, stage.first), min(stop, stage.stop)) for stage in traced.stages]
    return all((first, last, option) in errors.remaining for first, last in parts if first < last)


def pareto_front(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both time and error, the slowest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.time, candidate.error)):
        if not front or candidate.error < front[-1].error:
            front.append(candidate)
    return front[::-1]


def make_pool(traced: Traced, candidates: list[Candidate], slowest: float) -> dict[str, list[Candidate]]:
    """
    The Pareto front of each kind of plan, as the loss of accuracy for an error of the maps differs between reducers.

    Args:
        traced: the encoder.
        candidates: all plans.
        slowest: only plans faster than this, in ms.

    Returns:
        kind of plan -> its front, without plans whose error is far above that of other kinds at the same time.
    """
    kinds: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.option is None and candidate.keys == 1:  # what plans are compared with, as fast but for rounding
            continue
        if candidate.time < slowest and candidate.error <= MOST:
            kinds.setdefault(candidate.kind(traced), []).append(candidate)
    overall = pareto_front([candidate for group in kinds.values() for candidate in group])
    pool = {}
    for kind, group in kinds.items():
        front = [plan for plan in pareto_front(group) if plan.error <= FAR * _error_at(overall, plan.time)]
        if front:
            pool[kind] = front
    return pool


def _error_at(front: list[Candidate], time: float) -> float:
    """The least error of plans that take no longer."""
    return min((candidate.error for candidate in front if candidate.time <= time * (1 + 1e-9)), default=float("inf"))
