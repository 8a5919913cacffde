import inspect
from typing import TypeVar, cast

from torch import nn

from hourglass.encoders.hourglass import refuse_altered_forward
from hourglass.encoders.plan import Plan
from hourglass.encoders.registry import family_of, find_encoder
from hourglass.encoders.sharing import modules_holding, replaced
from hourglass.errors import InputError

Model = TypeVar("Model", bound=nn.Module)


def expedite(model: Model, plan: Plan) -> Model:
    """
    A second view of a model, whose encoder runs its middle blocks on fewer tokens.

    ``model`` is not changed. The view shares all parameters, buffers and hooks with it, all modules outside the
    encoder, and the names in ``state_dict()``. Later changes to one, such as ``.to()``, a new parameter or a hook, also
    apply to the other, except replacing a block, its ``mlp`` or its ``attn`` as a whole: expedite the model again after
    that. ``eval()`` and ``train()`` set the shared modules, and the unshared ones of the model that they are called on.

    Args:
        model: has, or is, one encoder of a registered family (:mod:`hourglass.encoders.registry`), unmodified or
            expedited. An encoder of an unknown class is verified first, see :func:`hourglass.verify`.
        plan: replaces the plan of an expedited model.

    Returns:
        the view.

    Raises:
        InputError: for a model without an encoder that can be expedited, or a plan that it cannot follow.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan must be a hourglass.Plan, got {plan!r}")
    _, encoder = find_encoder(model)
    above = [module for module in modules_holding(model, {encoder}) if module is not encoder]
    for module in above:
        refuse_altered_forward(module)
        _refuse_other_references(module, {encoder, *above})
    return cast(Model, replaced(model, {encoder: family_of(encoder).hourglass(encoder, plan)}))


def _refuse_other_references(module: nn.Module, targets: set[nn.Module]) -> None:
    """A view of a module cannot change what the module holds beside its children."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for candidate in values:
            owner = candidate.__self__ if inspect.ismethod(candidate) else candidate
            if isinstance(owner, nn.Module) and owner in targets:
                raise InputError(
                    f"{type(module).__name__} holds {type(owner).__name__} also in its attribute {name!r}, which is no "
                    "module, and would go on calling it unexpedited"
                )
