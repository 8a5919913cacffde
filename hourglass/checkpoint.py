"""Loading checkpoints, and refusing those that do not fit."""

import logging

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from hourglass.errors import InputError


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
    checkpointer = DetectionCheckpointer(model)
    # What is missing is said below, in one line.
    checkpointer.logger = logging.getLogger("hourglass.quiet")
    checkpointer.logger.disabled = True
    try:
        checkpoint = checkpointer._load_file(checkpointer.path_manager.get_local_path(path))
        if not isinstance(checkpoint.get("model"), dict):
            raise ValueError("it holds no parameters by name")
    except Exception as error:  # whatever a download, an unpickler or a file system may raise
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {_first_line(error)}): "
            "train.init_checkpoint takes a .pth or .pkl file or an address of one"
        ) from error

    fit = checkpointer._load_model(checkpoint)
    wrong = [f"{name} is {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in fit.incorrect_shapes]
    lacking = [name for name in fit.missing_keys if name not in {name for name, _, _ in fit.incorrect_shapes}]
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
    if fit.unexpected_keys:
        logging.getLogger(__name__).warning(
            "checkpoint %s has %d entries that the model has no place for (%s)",
            path,
            len(fit.unexpected_keys),
            _some(fit.unexpected_keys),
        )


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
