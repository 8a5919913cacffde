"""The hourglass in a LazyConfig."""

import copy
from collections.abc import Iterator
from pydoc import ErrorDuringImport
from typing import Any

from detectron2.config import LazyCall
from detectron2.modeling import Backbone
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from hourglass.encoders import Plan
from hourglass.encoders import expedite as expedite_model
from hourglass.encoders.hourglass import Hourglass
from hourglass.encoders.registry import families, is_encoder_class
from hourglass.errors import InputError


def build_hourglass(plan: Plan, encoder: str | type, **arguments: Any) -> Backbone:
    """
    The target that :func:`expedite` sets in the encoder's node.

    Args:
        plan: which blocks run on fewer tokens.
        encoder: the encoder's class, or its dotted name.
        arguments: the encoder's own.

    Returns:
        the hourglass around the encoder.

    Raises:
        InputError: for an object that is not a plan, or a plan that the encoder cannot follow.
    """
    build = locate(encoder) if isinstance(encoder, str) else encoder
    return expedite_model(build(**arguments), plan)


def expedite(cfg: DictConfig, plan: Plan | DictConfig) -> DictConfig:
    """
    The same config with its encoder's middle blocks on fewer tokens.

    The encoder's node keeps its place and all its arguments, so overrides of them and interpolations that read them
    work as before; its target becomes :func:`build_hourglass`, and ``plan`` and ``encoder`` (the former target) join
    its arguments. The model's parameters keep their names.

    Args:
        cfg: a LazyConfig. Its ``model.backbone`` is, or holds at any depth, the node of an encoder of a family
            that is registered, given as a class or by its dotted name. In an expedited config the plan is replaced.
        plan: a plan, or the node of one, ``L(Plan)(...)``. A node is made of a plan, so that its values can be
            overridden and the config be saved.

    Returns:
        a new config; ``cfg`` stays as it was.

    Raises:
        InputError: for a config without one such encoder, or an object that is not a plan.
    """
    if isinstance(plan, DictConfig) and "_target_" in plan:
        plan = copy.deepcopy(plan)
        with read_write(plan):
            OmegaConf.resolve(plan)  # it may read its neighbours, and moves away from them
    elif isinstance(plan, Plan):
        plan = plan_node(plan)
    else:
        raise InputError(f"plan must be a hourglass.Plan or a LazyCall of one, got {plan!r}")
    expedited = copy.deepcopy(cfg)
    node = find_encoder_node(expedited)
    target = _target(node)
    with read_write(node), open_dict(node):
        node._set_flag("allow_objects", True)  # a plan is an object, and so may the encoder's class be
        if target is not build_hourglass and not issubclass(target, Hourglass):
            name = _convert_target_to_string(target)
            node.encoder = name if _locate(name) is target else target
            node._target_ = build_hourglass
        node.plan = plan
    return expedited


def plan_node(plan: Plan) -> DictConfig | Plan:
    """
    The node that builds an equal plan; the plan itself where it has a calibration, or its reducer's arguments cannot be
    written in a node.
    """
    if plan.calibration is not None:
        return plan
    values = plan.describe()
    # What follows from the others stays open, so that it follows overrides of them too.
    if plan.attention == Plan(plan.reducer, published=plan.published and plan.reducer is not None).attention:
        del values["attention"]
    if plan.published and plan.reducer is not None:
        del values["proportional"]
    if plan.reducer is not None:
        try:
            arguments = {name: value for name, value in plan.reducer.describe().items() if name != "name"}
            node = LazyCall(type(plan.reducer))(**arguments)
        except (AttributeError, ValueError):  # an argument that it does not keep, or that no config can hold
            return plan
        values["reducer"] = node
    return LazyCall(Plan)(**values)


def find_encoder_node(cfg: DictConfig) -> DictConfig:
    """
    The node of the encoder in a LazyConfig's ``model.backbone``.

    Raises:
        InputError: where there is none or several.
    """
    backbone = OmegaConf.select(cfg, "model.backbone") if isinstance(cfg, DictConfig) else None
    if not isinstance(backbone, DictConfig):
        received = f"one with {', '.join(map(str, cfg)) or 'nothing'}" if isinstance(cfg, DictConfig) else repr(cfg)
        raise InputError(f"expedite needs a LazyConfig with a model.backbone, got {received}")
    nodes = dict(_call_nodes(backbone, "model.backbone"))
    names = [name for name, node in nodes.items() if _is_encoder(_target(node))]
    # The encoder that an hourglass's node holds is that one's.
    names = [name for name in names if not any(name.startswith(f"{outer}.") for outer in names)]
    if len(names) != 1:
        received = " and ".join(names) or f"none: {', '.join(f'{name} is {_name(nodes[name])}' for name in nodes)}"
        kinds = ", ".join(sorted({name for family in families() for name in family.class_names}))
        raise InputError(f"model.backbone must have one encoder to expedite (a class named {kinds}), got {received}")
    return nodes[names[0]]


def _call_nodes(node: Any, name: str) -> Iterator[tuple[str, DictConfig]]:
    """The nodes with a ``_target_`` in a config, and their full names. Interpolations are not followed."""
    children: list[tuple[Any, str]]
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield name, node
        children = [(key, f"{name}.{key!s}") for key in node]
    elif isinstance(node, ListConfig):
        children = [(i, f"{name}[{i}]") for i in range(len(node))]
    else:
        return
    for key, child in children:
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from _call_nodes(node[key], child)


def _target(node: DictConfig) -> Any:
    target = node._target_
    return _locate(target) if isinstance(target, str) else target


def _locate(name: str) -> Any:
    try:
        return locate(name)
    except (ImportError, ErrorDuringImport):
        return None


def _is_encoder(target: Any) -> bool:
    return target is build_hourglass or isinstance(target, type) and is_encoder_class(target)


def _name(node: DictConfig) -> str:
    target = node._target_
    return target if isinstance(target, str) else getattr(target, "__qualname__", repr(target))
