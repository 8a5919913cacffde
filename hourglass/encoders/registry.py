"""The registry of families of encoders."""

from torch import nn

from hourglass.encoders.contract import Family, unwrapped
from hourglass.encoders.sharing import base_class
from hourglass.errors import InputError

_families: list[Family] = []


def register(family: type[Family]) -> type[Family]:
    """A class decorator that registers a family."""
    _families.append(family())
    return family


def families() -> list[Family]:
    """The registered families, in the order of registration."""
    return list(_families)


def is_known(encoder: nn.Module) -> bool:
    """Whether an encoder, its blocks and their attention are of known classes, exactly."""
    family = next((family for family in _families if base_class(encoder) in family.known), None)
    if family is None:
        return False
    blocks = [unwrapped(block) for stage in family.stages(encoder) or () for block in stage]
    return all(base_class(module) in family.known for block in blocks for module in (block, block.attn))


def is_encoder_class(kind: type) -> bool:
    """Whether a class is one of encoders, by itself or by the name of a base; its instances are checked when built."""
    return any(
        base in family.known or base is family.hourglass or base.__name__ in family.class_names
        for family in _families
        for base in kind.__mro__
    )


def family_or_none(module: nn.Module) -> Family | None:
    """The family of a module, by its attributes; None for a module of no family."""
    # The last one first: a family that is built on another is told from that one by what it adds.
    return next((family for family in reversed(_families) if family.stages(module) is not None), None)


def family_of(encoder: nn.Module) -> Family:
    """
    The family of an encoder.

    Raises:
        InputError: for a module of no family.
    """
    family = family_or_none(encoder)
    if family is None:
        names = ", ".join(family.name for family in _families)
        raise InputError(f"an encoder to be expedited must be a {names}, got {type(encoder).__name__}")
    return family


def find_encoder(model: nn.Module) -> tuple[str, nn.Module]:
    """
    The encoder in a model, unmodified or expedited.

    Returns:
        its name in ``named_modules()`` ("" for the model itself), and the encoder.

    Raises:
        InputError: where the model has none or several.
    """
    candidates: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer, _ in candidates):
            continue  # of an encoder
        if family_or_none(module) is not None:
            candidates.append((name, module))
    if len(candidates) > 1:  # decoders may be built like an encoder that is not known
        candidates = [candidate for candidate in candidates if is_known(candidate[1])] or candidates
    if len(candidates) == 1:
        return candidates[0]
    kinds = " or ".join(family.name for family in families())
    if candidates:
        raise InputError(
            f"a model to be expedited must have one encoder, a {kinds}, got {type(model).__name__} with "
            f"{', '.join(f'{name} ({type(module).__name__})' for name, module in candidates)}"
        )
    backbone = getattr(model, "backbone", None)
    with_backbone = f" with the backbone {type(backbone).__name__}" if isinstance(backbone, nn.Module) else ""
    raise InputError(
        f"a model to be expedited must have one encoder, a {kinds} (hourglass's, Detectron2's, Mask2Former's, "
        f"segment-anything's, EVA's), got {type(model).__name__}{with_backbone}, which has none: to add another family "
        "of encoders, see hourglass.encoders.contract"
    )
