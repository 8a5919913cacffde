"""Loading checkpoints, and refusing those that do not fit."""

import logging
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from hourglass.errors import InputError


class _Checkpointer(DetectionCheckpointer):
    """Keeps what does not fit in place of warning of it."""

    misfit: Any = None

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        self.misfit = incompatible


def load_checkpoint(model: nn.Module, path: str, allow_partial: bool = False) -> None:
    """
    Load a checkpoint, in any format and from anywhere that Detectron2 reads. Detectron2 itself only warns of
    parameters that a checkpoint lacks; the AP is then an untrained model's.

    Args:
        model: whose parameters are filled.
        path: a file or an address, such as ``detectron2://...``.
        allow_partial: accept a checkpoint that does not fill all of the model.

    Raises:
        InputError: for a checkpoint that cannot be read, or fills less than all of the model.
    """
    checkpointer = _Checkpointer(model)
    try:
        checkpointer.load(path, checkpointables=[])
    except Exception as error:  # whatever a download, an unpickler or a file system may raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {reason}): "
            "train.init_checkpoint takes a .pth or .pkl file or an address of one"
        ) from error

    shapes = {name: (tuple(found), tuple(wanted)) for name, found, wanted in checkpointer.misfit.incorrect_shapes}
    wrong = [f"{name} is {found}, not {wanted}" for name, (found, wanted) in shapes.items()]
    lacking = [name for name in checkpointer.misfit.missing_keys if name not in shapes]
    if (wrong or lacking) and not allow_partial:
        reasons = []
        if wrong:
            reasons.append(f"{len(wrong)} of another shape ({_some(wrong)})")
        if lacking:
            reasons.append(f"{len(lacking)} missing ({_some(lacking)})")
        raise InputError(
            f"checkpoint {path} does not fit the model, of its {len(model.state_dict())} parameters and buffers "
            f"{' and '.join(reasons)}: give the config of the checkpoint's model, or set "
            "train.allow_partial_checkpoint=true to leave them as initialised"
        )
    unexpected = checkpointer.misfit.unexpected_keys
    if unexpected:
        logging.getLogger(__name__).warning(
            "checkpoint %s has %d entries that the model has no place for (%s)",
            path,
            len(unexpected),
            _some(unexpected),
        )


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
