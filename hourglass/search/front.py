"""Candidates: every plan that no other beats in predicted time and predicted error at once."""

import math
from typing import NamedTuple

from hourglass.encoders import Plan
from hourglass.search.latency import Latency
from hourglass.search.options import KEYS
from hourglass.search.trace import Errors, Traced

# Errors beyond which a model finds little: a share of the maps' variance.
MOST = 0.15
# A kind of plan that has so many times the error of others, at the same time, is left out.
FAR = 2.0


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
        """The plan's reducer."""
        return "keys" if self.option is None else type(traced.options[self.option].reducer).__name__

    def plan(self, traced: Traced) -> Plan:
        """Not calibrated."""
        if self.option is None:
            return Plan(attention="fast", keys=self.keys)
        option = traced.options[self.option]
        return Plan(option.reducer, self.start, self.stop, scope=option.scope, keys=self.keys)


def enumerate_plans(traced: Traced, errors: Errors, latency: Latency) -> list[Candidate]:
    """All plans that the encoder can follow, with what is predicted of them."""
    found = []
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
            if keys > 1 and not any(block not in planned for block, its_keys in errors.pooled if its_keys == keys):
                continue
            time = latency.of(traced, start, stop, option, keys)
            error = errors.of(traced, start, stop, option, keys)
            found.append(Candidate(start, stop, option, keys, time, error))
    return found


def _is_measured(traced: Traced, errors: Errors, start: int, stop: int, option: int) -> bool:
    parts = [(max(start, stage.first), min(stop, stage.stop)) for stage in traced.stages]
    return all((first, last, option) in errors.left for first, last in parts if first < last)


def pareto_front(candidates: list[Candidate]) -> list[Candidate]:
    """Those that none is both faster and nearer than, the slowest first."""
    front: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: (each.time, each.error)):
        if not front or each.error < front[-1].error:
            front.append(each)
    return front[::-1]


def make_pool(traced: Traced, candidates: list[Candidate], slowest: float) -> dict[str, list[Candidate]]:
    """
    Kind of plan -> its Pareto front, of plans faster than ``slowest`` ms: what an error of the maps is worth differs
    from one reducer to the next. A kind's plans that another kind's are far better than are left out.
    """
    kinds: dict[str, list[Candidate]] = {}
    for each in candidates:
        if each.time < slowest and each.error <= MOST:
            kinds.setdefault(each.kind(traced), []).append(each)
    overall = pareto_front([each for group in kinds.values() for each in group])
    pool = {}
    for kind, group in kinds.items():
        front = [each for each in pareto_front(group) if each.error <= FAR * _error_at(overall, each.time)]
        if front:
            pool[kind] = front
    return pool


def _error_at(front: list[Candidate], time: float) -> float:
    """The least error of plans that take no longer."""
    return min((each.error for each in front if each.time <= time * (1 + 1e-9)), default=float("inf"))


def spread(front: list[Candidate], number: int) -> list[Candidate]:
    """So many of a front, at even steps of the logarithm of their error, each once."""
    if len(front) <= number:
        return list(front)
    logs = [math.log(max(each.error, 1e-12)) for each in front]
    low, high = min(logs), max(logs)
    chosen: dict[int, None] = {}
    for i in range(number):
        level = low + (high - low) * i / max(1, number - 1)
        left = [j for j in range(len(front)) if j not in chosen]
        chosen[min(left, key=lambda j: (abs(logs[j] - level), j))] = None
    return [front[i] for i in sorted(chosen)]
