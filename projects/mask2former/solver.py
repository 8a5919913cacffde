"""Parameter groups that Mask2Former is trained with."""

from typing import Any

from torch import nn

from hourglass.errors import InputError


def optimizer_params(
    model: nn.Module, base_lr: float, weight_decay: float, backbone_multiplier: float = 0.1
) -> list[dict[str, Any]]:
    """
    Parameter groups as in the published recipes: a lower learning rate for the backbone, no weight decay for norms,
    embeddings and position tables.

    Args:
        model: a :class:`~projects.mask2former.Mask2Former`.
        base_lr: learning rate of all but the backbone.
        weight_decay: of all other parameters.
        backbone_multiplier: the backbone's learning rate over ``base_lr``, in (0, 1].

    Returns:
        for an optimizer; each trained parameter in one group.

    Raises:
        InputError: for a multiplier out of range.
    """
    if not 0 < backbone_multiplier <= 1:
        raise InputError(f"backbone_multiplier must be a factor in (0, 1], got {backbone_multiplier!r}")
    groups = {}
    for module_name, module in model.named_modules():
        lr = base_lr * (backbone_multiplier if module_name.split(".")[0] == "backbone" else 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            free = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding)) or name in _POSITIONS
            if parameter.requires_grad:
                groups.setdefault((lr, 0.0 if free else weight_decay), {})[parameter] = None
    return [{"params": list(parameters), "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]


_POSITIONS = ("relative_position_bias_table", "absolute_pos_embed")
