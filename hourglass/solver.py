"""Parameter groups for fine-tuning a vision transformer, on any release of Detectron2."""

from typing import Any

from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from hourglass.encoders import find_encoder
from hourglass.errors import InputError


def layer_of(name: str, depth: int) -> int:
    """
    The layer that a parameter of a ViT belongs to: 0 for what stands before the blocks, ``i + 1`` for block ``i``, and
    ``depth + 1`` for its convolutional residual block, which pretraining does not have.

    Args:
        name: of the parameter, in the ViT.
        depth: number of blocks.
    """
    part, _, remainder = name.partition(".")
    if part in ("pos_embed", "patch_embed"):
        return 0
    index, _, remainder = remainder.partition(".")
    if part == "blocks" and not remainder.startswith("residual."):
        return int(index) + 1
    return depth + 1


def layer_decay_params(model: nn.Module, base_lr: float, decay: float, **options: Any) -> list[dict[str, Any]]:
    """
    Parameter groups whose learning rate falls from the heads down to the image: ``base_lr`` for all that is not
    of the encoder, and ``decay`` to the power of the layers above a layer within it (as ViTDet, arXiv 2203.16527).

    Args:
        model: holds one encoder, unmodified or expedited.
        base_lr: learning rate of the neck and the heads.
        decay: in (0, 1], factor from a layer to the one below.
        options: for Detectron2's ``get_default_optimizer_params``, such as ``weight_decay_norm`` and ``overrides``.

    Returns:
        for an optimizer; each trained parameter in one group.

    Raises:
        InputError: for a decay out of range, or a model without one encoder that is a ViT.
    """
    if not 0 < decay <= 1:
        raise InputError(f"decay must be a factor in (0, 1], got {decay!r}")
    prefix, encoder = find_encoder(model)
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(f"layer_decay_params needs a model with a ViT, got one with {type(encoder).__name__}")
    prefix, depth = prefix + "." if prefix else "", len(blocks)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    # The 0.6 release takes no factor for a parameter, so the groups that it makes are split.
    for group in get_default_optimizer_params(model, base_lr=base_lr, **options):
        layers: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            name = names[parameter]
            layer = layer_of(name.removeprefix(prefix), depth) if name.startswith(prefix) else depth + 1
            layers.setdefault(layer, []).append(parameter)
        for layer, parameters in layers.items():
            groups.append({**group, "lr": group["lr"] * decay ** (depth + 1 - layer), "params": parameters})
    return groups
