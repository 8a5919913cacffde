"""
Second views of modules, which share everything with the first: parameters, buffers, children and hooks.

A view's dictionaries *are* those of the module that it is a view of. What is done to them later, such as ``.to()``, a
replaced parameter or a new hook, is done to both. Plain attributes, ``training`` among them, are the view's own.
"""

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn


def view_as(module: nn.Module, kind: type) -> nn.Module:
    """
    A view of a module that behaves as ``kind``: its class is ``kind`` before the module's own.

    Args:
        module: shares everything with the view. A view itself, it is looked through.
        kind: a class whose methods go before those of the module's class.
    """
    view = new_view(kind, base_class(module))
    view.__dict__.update(module.__dict__)
    return view


def new_view(kind: type, base: type) -> nn.Module:
    """An empty view that behaves as ``kind`` before ``base``."""
    return object.__new__(_class_of(kind, base))


def base_class(module: nn.Module) -> type:
    """The class of a module, or of what a view is a view of."""
    return getattr(type(module), "_viewed", type(module))


@functools.cache
def _class_of(kind: type, base: type) -> type:
    # Pickle finds no class that is made here: it makes the view again.
    members = {"_viewed": base, "__reduce_ex__": lambda self, protocol: (new_view, (kind, base), self.__dict__)}
    return type(kind.__name__, (kind, base), {**members, "__module__": kind.__module__, "__doc__": kind.__doc__})


def replaced(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """
    A view of a tree of modules with some of them replaced. The modules on the way to those are views, of the same
    classes; all others are the same modules.

    Args:
        root: stays as it is.
        new: what takes a module's place, wherever in the tree it is. Its own children are not looked at.

    Returns:
        the view; ``root`` itself where there is nothing to replace.
    """
    done: dict[nn.Module, nn.Module] = dict(new)

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            children = {name: child and visit(child) for name, child in module._modules.items()}
            if all(child is module._modules[name] for name, child in children.items()):
                done[module] = module
            else:
                done[module] = with_children(module, children)
        return done[module]

    return visit(root)


def with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A view of a module, of the same class, with other children."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    hide(view, _modules=children)
    return view


def hide(module: nn.Module, **attributes: Any) -> None:
    """Set attributes that are no children, parameters or buffers of a module, whatever they are."""
    module.__dict__.update(attributes)


def modules_holding(root: nn.Module, targets: set[nn.Module]) -> list[nn.Module]:
    """The modules that hold one of ``targets`` at any depth, or are one, from the root down."""
    found: dict[nn.Module, bool] = {}

    def holds(module: nn.Module) -> bool:
        if module not in found:
            found[module] = module in targets  # keeps its place before its children
            below = [holds(child) for child in module._modules.values() if child is not None]
            found[module] = found[module] or any(below)
        return found[module]

    holds(root)
    return [module for module, held in found.items() if held]


def unmodified(encoder: nn.Module) -> nn.Module:
    """The encoder that an hourglass is a view of; another module is its own."""
    return encoder.__dict__.get("_unmodified", encoder)
