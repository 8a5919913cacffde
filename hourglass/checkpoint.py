"""Loading checkpoints, and refusing those that do not fit."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from hourglass.errors import InputError

HUB = "hf://"


class _Checkpointer(DetectionCheckpointer):
    """Reads Hugging Face's folders too, and keeps what does not fit in place of warning of it."""

    misfit: Any = None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if path.startswith(HUB):
            path = _download(path.removeprefix(HUB))
        if os.path.isdir(path):
            self.misfit = self._load_model({"model": _read_folder(Path(path))})
            return {}
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        rename = getattr(self.model, "rename_weights", None)
        if rename is not None:
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = rename(checkpoint["model"])
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        self.misfit = incompatible


def load_checkpoint(model: nn.Module, path: str, allow_partial: bool = False) -> None:
    """
    Load a checkpoint, in any format and from anywhere that Detectron2 reads, or as Hugging Face's ``save_pretrained``
    writes it. Detectron2 itself only warns of parameters that a checkpoint lacks; the AP is then an untrained model's.

    Args:
        model: whose parameters are filled. Where it has a method ``rename_weights``, that takes what was read, name ->
            tensor, and returns it under the model's names.
        path: a file or an address, such as ``detectron2://...``; a folder with ``model.safetensors`` or
            ``pytorch_model.bin``, whole or in parts; or ``hf://`` and a name on the Hugging Face hub.
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
            "train.init_checkpoint takes a .pth or .pkl file or an address of one, a folder of Hugging Face's "
            "save_pretrained, or hf://owner/name"
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


# Either may come in parts, with a list of them in <name>.index.json.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def _download(name: str) -> str:
    """The folder that a model of the Hugging Face hub is kept in, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download

    # Many models are there in both formats: the second is asked for where the first is missing.
    for patterns in (["model*.safetensors*"], ["pytorch_model*.bin*"]):
        folder = snapshot_download(name, allow_patterns=patterns)
        if any(found for pattern in patterns for found in Path(folder).glob(pattern)):
            break
    return folder


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_weights(folder / name)
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: tensor for part in parts for key, tensor in _read_weights(folder / part).items()}
    raise FileNotFoundError(f"the folder has neither {' nor '.join(_WEIGHT_FILES)}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
