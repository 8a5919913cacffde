"""Checks of arguments that many places share."""

from collections.abc import Sequence
from numbers import Integral
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
