"""Checks of arguments that many places share."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from hourglass.errors import InputError


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} takes {' or '.join(repr(choice) for choice in choices)}, got {value!r}")


def check_count(name: str, value: Any, smallest: int) -> None:
    """Raise InputError unless ``value`` is a whole number of at least ``smallest``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise InputError(f"{name} takes a whole number of at least {smallest}, got {value!r}")


def check_number(name: str, value: Any, over: float) -> None:
    """Raise InputError unless ``value`` is a finite number over ``over``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= over:
        raise InputError(f"{name} takes a number over {over:g}, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} takes true or false, got {value!r}")


def repeated(values: Iterable[Any]) -> list[Any]:
    """Those that are among the values before them, too."""
    seen: set[Any] = set()
    duplicates = []
    for value in values:
        if value in seen:
            duplicates.append(value)
        seen.add(value)
    return duplicates


def check_text(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` is text."""
    if not isinstance(value, str):
        raise InputError(f"{name} takes text, got {value!r}")
