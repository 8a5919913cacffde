"""The goal of a search."""

from collections.abc import Sequence
from typing import NamedTuple

from hourglass.errors import InputError

LABELS = ("auto", "none")


class Goal(NamedTuple):
    """
    Attributes:
        keep: share of each AP, PQ or mIoU to keep, in (0, 1): the search finds the fastest plan that keeps it; None:
            see `speed`.
        speed: speed-up of the encoder over fast attention alone, over 1: the search finds the plan that keeps most.
        labels: "auto": labels are used where the data have them; "none": they are not used.
        seed: of how the images are split.
    """

    keep: float | None = None
    speed: float | None = None
    labels: str = "auto"
    seed: int = 0

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Goal":
        """
        Args:
            words: such as "keep=0.99" and "labels=none".

        Raises:
            InputError: for words that are not "key=value", and values out of range.
        """
        values: dict = {}
        for word in words:
            key, equals, value = word.partition("=")
            if key not in cls._fields or not equals:
                raise InputError(f"--search must be {', '.join(f'{name}=...' for name in cls._fields)}, got {word!r}")
            if key in values:
                raise InputError(f"--search must have {key} once, got it again as {word!r}")
            try:
                values[key] = value if key == "labels" else int(value) if key == "seed" else float(value)
            except ValueError:
                kind = "a whole number" if key == "seed" else "a number"
                raise InputError(f"--search must have {key}={kind}, got {word!r}") from None
        goal = cls(**values)
        if (goal.keep is None) == (goal.speed is None):
            given = " ".join(words) or "neither"
            raise InputError(f"--search needs either keep, such as keep=0.99, or speed, such as speed=2, got {given}")
        if goal.keep is not None and not 0 < goal.keep < 1:
            raise InputError(
                f"--search: keep must be over 0 and under 1, a share of what the model finds, got {goal.keep:g}"
            )
        if goal.speed is not None and not 1 < goal.speed < float("inf"):
            raise InputError(f"--search: speed must be over 1, that of fast attention alone, got {goal.speed:g}")
        if goal.labels not in LABELS:
            raise InputError(f"--search: labels must be auto or none, got {goal.labels}")
        if goal.seed < 0:
            raise InputError(f"--search: seed must be at least 0, got {goal.seed}")
        return goal

    def __str__(self) -> str:
        target = f"keep={self.keep:g}" if self.keep is not None else f"speed={self.speed:g}"
        return target + (" labels=none" if self.labels == "none" else "")
