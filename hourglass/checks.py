"""Checks of arguments that many places share."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from hourglass.errors import InputError

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} must be {' or '.join(repr(choice) for choice in choices)}, got {value!r}")


def check_count(name: str, value: Any, smallest: int) -> None:
    """Raise InputError unless ``value`` is a whole number of at least ``smallest``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise InputError(f"{name} must be a whole number of at least {smallest}, got {value!r}")


def check_number(name: str, value: Any, over: float) -> None:
    """Raise InputError unless ``value`` is a finite number over ``over``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= over:
        raise InputError(f"{name} must be a number over {over:g}, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    """Raise InputError unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}")


def repeated(values: Iterable[Any]) -> list[Any]:
    """The values that occurred before, in order: [1, 2, 1, 1] -> [1, 1]."""
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
        raise InputError(f"{name} must be text, got {value!r}")


def renamed_argument(former: str, name: str) -> Callable[[Constructor], Constructor]:
    """
    A decorator of a constructor whose argument ``name`` was called ``former``: that keyword is still accepted.

    Raises:
        InputError: from the constructor, where both are given.
    """

    def decorate(constructor: Constructor) -> Constructor:
        signature = inspect.signature(constructor)

        @functools.wraps(constructor)
        def construct(self: Any, *values: Any, **options: Any) -> None:
            if former in options:
                value = options.pop(former)
                given = signature.bind_partial(self, *values, **options).arguments
                if name in given:
                    raise InputError(
                        f"{name} must be given once, got {name}={given[name]!r} and, by its former name, "
                        f"{former}={value!r}"
                    )
                options[name] = value
            constructor(self, *values, **options)

        setattr(construct, "former_names", (former,))  # noqa: B010
        return construct  # type: ignore[return-value]

    return decorate


def former_names(constructor: Any) -> tuple[str, ...]:
    """The former names of arguments that a class, or its ``__init__``, still accepts."""
    constructor = getattr(constructor, "__init__", None) if isinstance(constructor, type) else constructor
    return getattr(constructor, "former_names", ())
