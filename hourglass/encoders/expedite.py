import copy
from itertools import chain

from torch import nn

from hourglass.compat import own_encoder
from hourglass.encoders.hourglass_swin import HourglassSwin
from hourglass.encoders.hourglass_vit import HourglassViT
from hourglass.encoders.plan import Plan
from hourglass.encoders.swin import Swin
from hourglass.encoders.vit import ViT
from hourglass.errors import InputError

#: The encoders that can be expedited, and the hourglass for each.
HOURGLASSES: dict[type, type] = {
    kind: hourglass
    for hourglass, kinds in (
        (HourglassViT, (ViT, HourglassViT, own_encoder("ViT"))),
        (HourglassSwin, (Swin, HourglassSwin, own_encoder("SwinTransformer"))),
    )
    for kind in kinds
    if kind is not None
}


def find_encoder(model: nn.Module) -> tuple[str, nn.Module]:
    """
    The encoder in a model, unmodified or expedited, and its name (that of ``named_modules``; "" for the model itself).

    Raises:
        InputError: where the model has none or several.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, tuple(HOURGLASSES))]
    if len(found) != 1:
        names = sorted({f"{kind.__module__}.{kind.__qualname__}" for kind in HOURGLASSES})
        raise InputError(
            f"a model to be expedited has one encoder of {', '.join(names)}, "
            f"got {type(model).__name__} with {', '.join(name for name, _ in found) or 'none'}"
        )
    return found[0]


def hourglass_of(encoder: nn.Module) -> type:
    """The hourglass for an encoder that :func:`find_encoder` found."""
    return next(HOURGLASSES[base] for base in type(encoder).__mro__ if base in HOURGLASSES)


def expedite(model: nn.Module, plan: Plan) -> nn.Module:
    """
    A second view of a model, with its encoder's middle blocks on fewer tokens.

    Every parameter and buffer is shared with ``model``, which stays as it was; the names in ``state_dict()`` are the
    same. The views' ``training`` flags are independent.

    Args:
        model: holds, or is, a ViT or a Swin (ours or Detectron2's), unmodified or expedited.
        plan: replaces the plan of an expedited model.

    Raises:
        InputError: for a model without an encoder that can be expedited, or a plan that it cannot follow.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan takes a hourglass.Plan, got {plan!r}")
    name, encoder = find_encoder(model)
    plan.blocks(hourglass_of(encoder).depth(encoder))  # refuse before copying
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    view = copy.deepcopy(model, shared)
    copied = view.get_submodule(name)
    hourglass = hourglass_of(copied)(copied, plan)
    if not name:
        return hourglass
    parent, _, child = name.rpartition(".")
    setattr(view.get_submodule(parent), child, hourglass)
    return view
