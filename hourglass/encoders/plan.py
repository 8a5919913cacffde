import copy
import os
from numbers import Integral
from typing import Any

from hourglass.checks import check_choice, check_count
from hourglass.encoders.calibration import Calibration
from hourglass.errors import InputError
from hourglass.reduction import LinearBlocks, Reducer, SkipBlocks

SCOPES = ("map", "window")
ATTENTION = ("plain", "fast")


class Plan:
    """
    Which blocks of an encoder run on fewer tokens, and the reducer that reduces them. ``Plan()`` is the unmodified
    encoder.

    Args:
        reducer: makes the smaller map; None: every block runs on all tokens.
        start: the first block, counted from 0, that runs on the smaller map.
        stop: the block before which the full map is restored; None: after the last.
        scope: "map": the reducer is applied to the whole map; "window": to each attention window.
        proportional: whether attention adds the logarithm of the number of tokens that a key stands for to its score
            (ToMe, arXiv 2210.09461), where the reducer gives that number.
        published: whether to compute as the papers' own code does, for comparison with their figures: with the
            reducer's published form (:meth:`Reducer.published_form`) and without proportional attention. In Swin
            everything else follows the authors' code too, see :class:`~hourglass.HourglassSwin`; in a ViT only the
            reducer does.
        attention: of every block, "fast" or "plain", the formula, which materialises all scores as the published
            encoders do; both give the same result to float32's rounding (:mod:`hourglass.attention`). None: "fast" with
            pooled keys or a reducer that is not run as published, else "plain".
        calibration: of the plan's restoring, from :func:`hourglass.calibrate`, or the path of its file.
        keys: side of the cells, in tokens, whose keys and values are pooled in blocks with global attention outside the
            planned ones: each key and value is the projection of a cell's mean, with its mean relative position, or its
            centre's rotary one. Lossy. 1: no pooling.

    Raises:
        InputError: for an argument out of range.
    """

    def __init__(
        self,
        reducer: Reducer | None = None,
        start: int = 0,
        stop: int | None = None,
        scope: str = "map",
        proportional: bool = True,
        published: bool = False,
        attention: str | None = None,
        calibration: Calibration | str | os.PathLike | None = None,
        keys: int = 1,
    ):
        if reducer is not None and not isinstance(reducer, Reducer):
            raise InputError(f"reducer must be a hourglass.Reducer or None, got {reducer!r}")
        check_count("start", start, 0)
        check_count("keys", keys, 1)
        if stop is not None and (isinstance(stop, bool) or not isinstance(stop, Integral) or stop <= start):
            raise InputError(f"stop must be a whole number over start ({start}) or None, got {stop!r}")
        check_choice("scope", scope, SCOPES)
        for name, value in (("proportional", proportional), ("published", published)):
            if not isinstance(value, bool):
                raise InputError(f"{name} must be True or False, got {value!r}")
        if attention is not None:
            check_choice("attention", attention, ATTENTION)
        if reducer is not None and scope not in reducer.scopes:
            raise InputError(f'{type(reducer).__name__} acts on whole blocks: scope must be "map", got {scope!r}')
        if calibration is not None and not isinstance(calibration, Calibration | str | os.PathLike):
            raise InputError(f"calibration must be a Calibration, its file or None, got {calibration!r}")
        if calibration is not None and (reducer is None or published):
            raise InputError("calibration must be None in a plan without a reducer or with published=True")
        self.reducer = reducer.published_form() if published and reducer is not None else reducer
        self.start = start
        self.stop = stop
        self.scope = scope
        self.proportional = proportional and not (published and reducer is not None)
        self.published = published
        self.attention = attention or ("fast" if (reducer is not None and not published) or keys > 1 else "plain")
        self.keys = keys
        self.calibration: Calibration | None = None
        if calibration is not None:
            self.calibration = calibration if isinstance(calibration, Calibration) else Calibration.read(calibration)
            self.calibration.check_plan(self.uncalibrated().describe())

    @property
    def fast(self) -> bool:
        """Whether attention is the fast one."""
        return self.attention == "fast"

    def blocks(self, depth: int) -> range:
        """
        The blocks that run on the smaller map, in an encoder of ``depth`` blocks.

        Raises:
            InputError: where the encoder does not have all of them.
        """
        if self.reducer is None:
            return range(0)
        stop = depth if self.stop is None else self.stop
        if not self.start < stop <= depth:
            raise InputError(
                f"a plan needs 0 <= start < stop <= {depth} (the encoder's number of blocks), "
                f"got start {self.start} and stop {self.stop}"
            )
        return range(self.start, stop)

    def control(self) -> "Plan":
        """The control of this plan: its blocks are skipped (:class:`~hourglass.SkipBlocks`)."""
        return Plan(SkipBlocks(), self.start, self.stop, attention=self.attention, keys=self.keys)

    def linear_control(self) -> "Plan":
        """The control with an affine map in place of the plan's blocks, to be calibrated."""
        return Plan(LinearBlocks(), self.start, self.stop, attention=self.attention, keys=self.keys)

    def uncalibrated(self) -> "Plan":
        """The same plan without its calibration."""
        plan = copy.copy(self)
        plan.calibration = None
        return plan

    def to_be_calibrated(self) -> "Plan":
        """The plan that a calibration is fitted under: uncalibrated, with the blocks of ``LinearBlocks`` skipped."""
        return self.control() if self.reducer is not None and self.reducer.needs_calibration else self.uncalibrated()

    def calibrated(self, calibration: Calibration) -> "Plan":
        """
        The same plan with a calibration.

        Raises:
            InputError: for one that was made for another plan.
        """
        calibration.check_plan(self.uncalibrated().describe())
        plan = copy.copy(self)
        plan.calibration = calibration
        return plan

    def describe(self) -> dict[str, Any]:
        """The arguments, as plain values."""
        reducer = None if self.reducer is None else self.reducer.describe()
        description = {
            "reducer": reducer,
            "start": self.start,
            "stop": self.stop,
            "scope": self.scope,
            "proportional": self.proportional,
            "published": self.published,
            "attention": self.attention,
        }
        if self.keys > 1:
            description["keys"] = self.keys
        if self.calibration is not None:
            description["calibration"] = self.calibration.describe()
        return description

    def __repr__(self) -> str:
        optional = f", keys={self.keys}" if self.keys > 1 else ""
        optional += "" if self.calibration is None else f", calibration={self.calibration!r}"
        return (
            f"Plan({self.reducer!r}, {self.start}, {self.stop}, scope={self.scope!r}, "
            f"proportional={self.proportional}, published={self.published}, attention={self.attention!r}{optional})"
        )
