"""Command line overrides of a LazyConfig; unknown keys are errors."""

import difflib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from hourglass.checks import former_names
from hourglass.errors import InputError

_KEY = re.compile(r"[A-Za-z_][\w.]*")


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """
    Override contents of a config in place, like Detectron2's ``LazyConfig.apply_overrides``, but refuse unknown keys. A
    key is known if the config has it, or if its parent is a call with such an argument. Overriding ``_target_`` removes
    the arguments that the new target does not accept.

    Args:
        cfg: the config.
        overrides: "key=value", with Hydra's grammar for values; a value outside of it is text.

    Raises:
        InputError: for an override that cannot be parsed, or an unknown key; the message has the nearest known one.
    """
    parsed = [_parse(override) for override in overrides]
    # What a call takes is known once its target is.
    ordered = sorted(zip(parsed, overrides), key=lambda pair: not pair[0][0].endswith("_target_"))
    for (key, text), override in ordered:
        _check_key(cfg, key)
        try:
            if text is None:
                LazyConfig.apply_overrides(cfg, [override])
            else:
                OmegaConf.update(cfg, key, text, merge=True, force_add=True)
        except Exception as error:  # OmegaConf has many
            raise InputError(f"override {override!r} cannot be applied: {str(error).splitlines()[0]}") from error
        if key.endswith("._target_"):
            _drop_foreign_arguments(OmegaConf.select(cfg, key.removesuffix("._target_")))


def is_override(word: str) -> bool:
    """Whether a word that follows an option's own, such as a path, is an override: it has a dot before its "="."""
    key, mark, _ = word.partition("=")
    return bool(mark) and "." in key and _KEY.fullmatch(key) is not None


def _drop_foreign_arguments(node: DictConfig) -> None:
    """What the config gave to another target goes, where the new one does not take it."""
    accepted = _arguments(node._target_)
    for name in [] if accepted is None else [str(name) for name in node if name not in ("_target_", *accepted)]:
        del node[name]


def _parse(override: str) -> tuple[str, str | None]:
    """The key, and the value where it is text that Hydra's grammar has no place for, such as a path with "=" in it."""
    key, equals, value = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        # What begins as a list, a dictionary or a quoted string is meant to be one, and not closed.
        if _KEY.fullmatch(key) and equals and not value.lstrip().startswith(("[", "{", "'", '"')):
            return key, value
        raise InputError(
            f"override {override!r} cannot be parsed: it must be key=value, such as plan.start=4"
        ) from error
    if parsed.is_delete() or parsed.is_add():
        raise InputError(f"override {override!r} is not accepted: it must be key=value, such as plan.start=4")
    if parsed.is_sweep_override():  # values for runs of Hydra's: here a comma is one
        return parsed.key_or_group, value
    return parsed.key_or_group, None


def _check_key(cfg: DictConfig, key: str) -> None:
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        accepted = _accepted_keys(node)
        if accepted is None or part in accepted:
            try:
                node = OmegaConf.select(cfg, ".".join(parts[: depth + 1]), throw_on_missing=False)
            except Exception:  # an interpolation that does not resolve yet: its key is there
                node = None
            continue
        parent = ".".join(parts[:depth])
        current = _accepted_keys(node, former=False) or []
        near = difflib.get_close_matches(part, current, n=1, cutoff=0.3)
        nearest = f"did you mean {'.'.join([*parts[:depth], near[0], *parts[depth + 1 :]])!r}?" if near else ""
        raise InputError(
            f"unknown key {key!r}: {parent or 'the config'} has no {part!r}; "
            + (nearest or f"it takes {', '.join(sorted(current))}")
        )


def _accepted_keys(node: Any, former: bool = True) -> list[str] | None:
    """The keys that a node takes, with ``former`` also arguments' former names; None where any may be given."""
    if isinstance(node, ListConfig):
        return [str(i) for i in range(len(node))]
    if not isinstance(node, DictConfig):
        return [] if node is not None else None
    keys = [str(key) for key in node]
    if "_target_" in node:
        arguments = _arguments(node._target_, former)
        if arguments is None:
            return None
        keys += arguments
    return keys


def _arguments(target: Any, former: bool = True) -> list[str] | None:
    """The arguments that a callable, or the dotted name of one, takes; None where it takes any."""
    if isinstance(target, str):
        try:
            located = locate(target)
        except Exception as error:  # whatever importing it may raise
            raise InputError(
                f"_target_ {target!r} cannot be imported: it must be the dotted name of a callable"
            ) from error
        if not callable(located):
            raise InputError(f"_target_ must be the dotted name of a callable, got {target!r}")
        target = located
    # A class hands the keywords that it does not know on to its base.
    makers: list[Any] = [target]
    if isinstance(target, type):
        makers = [vars(kind)["__init__"] for kind in target.__mro__ if "__init__" in vars(kind)]
    names: list[str] = []
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        names += [
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        names += former_names(maker) if former else ()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return [name for name in names if name != "self"]
    return None
