"""Loading checkpoints, with an error for those that do not match the model."""

import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from hourglass.errors import InputError, reason
from hourglass.weights import read_weights

HUB = "hf://"
HEURISTICS = "matching_heuristics"

# Where trainers keep the weights of the model in a checkpoint, by preference.
_HOLDERS = ("model", "state_dict", "model_state_dict", "model_state")
# The names that wrappers of a whole model give to it: of data parallelism, torch.compile, Lightning, ...
_WRAPPERS = ("module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "state_dict")
# Those that wrap its parts too, and change no other name.
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, which reads files as data (:func:`read_checkpoint`) and removes the prefixes that a
    model's wrappers add to names. Mismatches are kept in ``misfit`` instead of being logged.
    """

    misfit: Any = None

    def fill(self, checkpoint: dict[str, Any]) -> None:
        """Load the weights of a checkpoint that was read."""
        self.misfit = self._load_model(checkpoint)

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        rename = getattr(self.model, "rename_weights", dict)
        weights = _unwrap(checkpoint["model"], self.model.state_dict())
        if checkpoint.get(HEURISTICS):
            weights = _strip(weights, _shared_wrapper(weights))
        else:
            weights = _strip(weights, _find_prefix(weights, self.model.state_dict(), rename))
        checkpoint["model"] = weights if rename is dict else rename(weights)
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
            ``pytorch_model.bin``, whole or in parts; or ``hf://`` and a name on the Hugging Face hub. With
            ``?matching_heuristics=True`` behind it, names are matched by their ends, as Detectron2's main branch does:
            for the weights of an encoder alone.
        allow_partial: accept a checkpoint that fills a part of the model.

    Raises:
        InputError: for a checkpoint that cannot be read, holds more than data, or fills less than all of the model;
            with ``allow_partial``, none of its parameters.
    """
    checkpointer = Checkpointer(model)
    file, heuristics = _split_query(path)
    try:
        checkpoint = read_checkpoint(_local(file, checkpointer))
    except InputError:
        raise
    except Exception as error:  # whatever a download, an unpickler or a file system may raise
        raise InputError(
            f"checkpoint {path} cannot be read ({reason(error)}): train.init_checkpoint must be a .pth, .pkl or "
            ".safetensors file or an address of one, a folder of Hugging Face's save_pretrained, or hf://owner/name"
        ) from error
    if heuristics:
        checkpoint[HEURISTICS] = True
    names = list(checkpoint["model"])
    try:
        checkpointer.fill(checkpoint)
    except ValueError as error:
        if isinstance(error, InputError):
            raise InputError(f"checkpoint {path} {error}") from error
        raise InputError(f"checkpoint {path} cannot be matched to the model ({reason(error)})") from error

    misfit = describe_misfit(checkpointer)
    expected = model.state_dict()
    if misfit and not allow_partial:
        raise InputError(
            f"checkpoint {path} does not fit the model, of its {len(expected)} parameters and buffers {misfit}: "
            f"{_advise(names, expected)}give the config of the checkpoint's model, or set "
            "train.allow_partial_checkpoint=true to leave them as initialised"
        )
    if misfit:
        empty = {*checkpointer.misfit.missing_keys, *(name for name, *_ in checkpointer.misfit.incorrect_shapes)}
        if all(name in empty for name, _ in model.named_parameters()):
            raise InputError(
                f"checkpoint {path} fills none of the model's parameters, {misfit}: {_advise(names, expected)}"
                f"its own names are {_some(names)}"
            )
        logger.warning(
            "checkpoint %s fills %d of the model's %d parameters and buffers, the rest is left as initialised: %s",
            path,
            len(expected) - len(empty & expected.keys()),
            len(expected),
            misfit,
        )
    unexpected = checkpointer.misfit.unexpected_keys
    if unexpected:
        logger.warning(
            "checkpoint %s has %d entries that the model has no place for (%s)",
            path,
            len(unexpected),
            _some(unexpected),
        )


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read the file or the folder of a checkpoint, as data.

    Args:
        path: a file in one of the formats that :func:`~hourglass.weights.read_weights` takes, of Detectron2, pycls,
            Detectron or Caffe2 and their model zoos, or of another trainer that keeps the weights under a name; or a
            folder as Hugging Face's ``save_pretrained`` writes it.

    Returns:
        with ``model``, name -> tensor; what else a checkpoint of Detectron2 holds; and ``matching_heuristics`` where
        Detectron2 matches names of this format by their ends.

    Raises:
        InputError: for a file that holds more than data, or more than one model's weights.
        Exception: whatever a file system, or a reader of a damaged file, may raise.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return {"model": _tensors(_read_folder(Path(path)), path)}
    content = read_weights(path)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not tensors by their names")
    heuristics: dict[str, Any] = {}
    if path.endswith(".pyth") and "model_state" in content:  # of pycls
        content = {"model": {k: v for k, v in content["model_state"].items() if not k.endswith("num_batches_tracked")}}
        heuristics = {HEURISTICS: True, "__author__": "pycls"}
    elif path.endswith(".pkl") and _is_caffe2(content):
        content = content.get("blobs", content)  # detectors have them, ImageNet models have not
        content = {"model": {name: value for name, value in content.items() if not name.endswith("_momentum")}}
        heuristics = {HEURISTICS: True, "__author__": "Caffe2"}
    weights = _find_weights(content, path)
    metadata = content if isinstance(content.get("model"), dict) else {}
    return {**metadata, **heuristics, "model": _tensors(weights, path)}


def _is_caffe2(content: dict) -> bool:
    """Caffe2's names have no dots, torch's have."""
    blobs = content.get("blobs", content)
    named = isinstance(blobs, dict) and blobs and all(isinstance(name, str) for name in blobs)
    return bool(named) and not any("." in name for name in blobs) and any(map(_is_array, blobs.values()))


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic)


def _find_weights(content: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """What of a checkpoint maps names to tensors."""
    held = {name: value for name, value in content.items() if _holds_weights(value)}
    holder = next((name for name in _HOLDERS if name in held), None)
    if holder is None and any(map(_is_array, content.values())):
        return content
    if holder is None and len(held) == 1:
        (holder,) = held
        logger.warning("checkpoint %s: the weights under %r are read", path, holder)
    if holder is None and held:
        raise InputError(
            f"checkpoint {path} holds more than one set of weights, {', '.join(map(repr, held))}: save only the one to "
            "be read, as {'model': weights}"
        )
    if holder is None:
        raise TypeError(f"it holds no tensors, only {_some([repr(name) for name in content]) or 'nothing'}")
    ignored = [name for name in held if name != holder]
    if ignored:
        logger.warning(
            "checkpoint %s: the weights under %r are read, those under %s are not",
            path,
            holder,
            ", ".join(map(repr, ignored)),
        )
    return held[holder] if any(map(_is_array, held[holder].values())) else _find_weights(held[holder], path)


def _holds_weights(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return any(map(_is_array, value.values())) or any(_holds_weights(value.get(name)) for name in _HOLDERS)


def _tensors(weights: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The arrays as tensors; what else stands among them fills no parameter, and is left out."""
    tensors = OrderedDict()
    for name, value in weights.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif _is_array(value):
            # torch takes neither foreign byte orders nor read-only memory; most arrays are not copied.
            array = np.require(value, value.dtype.newbyteorder("="), "W")
            tensors[name] = torch.from_numpy(array)
    foreign = [str(name) for name in weights if name not in tensors]
    if foreign:
        logger.warning("checkpoint %s has %d entries that are no tensors (%s)", path, len(foreign), _some(foreign))
    if hasattr(weights, "_metadata"):  # the versions of its modules
        vars(tensors)["_metadata"] = dict(weights._metadata)
    return tensors


def _unwrap(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the names that wrappers of parts of the model have put in between."""
    inner = [name for name in _INNER_WRAPPERS if not any(name in key.split(".") for key in expected)]
    wrappers = sorted({part for name in weights for part in name.split(".") if part in inner})
    if not wrappers:
        return weights
    logger.warning("the checkpoint's names are read without %s", " and ".join(repr(f"{part}.") for part in wrappers))

    def rename(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in wrappers)

    unwrapped = OrderedDict((rename(name), tensor) for name, tensor in weights.items())
    if len(unwrapped) < len(weights):
        raise InputError(
            f"has the same names with and without {' and '.join(map(repr, wrappers))}: save only one of the sets"
        )
    if hasattr(weights, "_metadata"):
        vars(unwrapped)["_metadata"] = {rename(name): value for name, value in weights._metadata.items()}
    return unwrapped


def _strip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """With the names that begin with ``prefix`` cut, the others as they are."""
    if not prefix:
        return weights
    logger.warning("the checkpoint's names are read without their prefix %r", prefix)
    stripped = OrderedDict((name, tensor) for name, tensor in weights.items() if not name.startswith(prefix))
    stripped.update((name[len(prefix) :], tensor) for name, tensor in weights.items() if name.startswith(prefix))
    if hasattr(weights, "_metadata"):
        vars(stripped)["_metadata"] = {name.removeprefix(prefix): value for name, value in weights._metadata.items()}
    return stripped


def _shared_wrapper(names: Iterable[str]) -> str:
    """The prefix of wrappers that all names have."""
    parts = os.path.commonprefix([name.split(".")[:-1] for name in names])
    wrappers = []
    for part in parts:
        if part not in _WRAPPERS:
            break
        wrappers.append(part + ".")
    return "".join(wrappers)


def _find_prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], rename: Any) -> str:
    """
    The prefix without which names are the model's: one of wrappers, or any other if the model is filled without it and
    by no other.
    """

    def filled(prefix: str) -> int:
        cut = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        return sum(name in expected and tensor.shape == expected[name].shape for name, tensor in rename(cut).items())

    as_it_is = filled("")
    if as_it_is == len(expected):
        return ""
    candidates = [prefix for prefix, _ in _prefixes(weights, expected).most_common(8)]
    # Where names are changed after this, the model's are not there to compare with.
    candidates += [_shared_wrapper([name]) for name in weights]
    counts = {prefix: filled(prefix) for prefix in dict.fromkeys(candidates) if prefix}
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if most <= as_it_is or not (most == len(expected) or all(map(_is_wrapper, best))):
        return ""
    if len(best) > 1:
        raise InputError(
            f"holds the model's weights under {' and under '.join(map(repr, best))}: save only one of the sets"
        )
    return best[0]


def _is_wrapper(prefix: str) -> bool:
    return all(part in _WRAPPERS for part in prefix.rstrip(".").split("."))


def _prefixes(longer: Iterable[str], shorter: Iterable[str]) -> Counter:
    """How many of the longer names are one of the shorter behind a prefix, by prefix."""
    shorter = set(shorter)
    counts: Counter[str] = Counter()
    for name in longer:
        ends = [i + 1 for i, character in enumerate(name) if character == "."]
        counts.update(name[:end] for end in ends if name[end:] in shorter)
    return counts


def _advise(names: list[str], expected: Mapping[str, Tensor]) -> str:
    """What the names of a checkpoint that does not fit have before the model's, or the model's before them."""
    for (prefix, count), advice in (
        (_most_common(_prefixes(names, expected)), "{count} of its names are the model's behind {prefix!r}; "),
        (
            _most_common(_prefixes(expected, names)),
            f"{{count}} of its names are the model's without {{prefix!r}}, add ?{HEURISTICS}=True to its path; ",
        ),
    ):
        if count > sum(name in expected for name in names):
            return advice.format(count=count, prefix=prefix)
    return ""


def _most_common(counts: Counter) -> tuple[str, int]:
    return counts.most_common(1)[0] if counts else ("", 0)


def describe_misfit(checkpointer: Checkpointer) -> str:
    """What of the model the checkpoint that was loaded last did not fill, in words; nothing: empty."""
    shapes = {name: (tuple(actual), tuple(expected)) for name, actual, expected in checkpointer.misfit.incorrect_shapes}
    wrong = [f"{name} is {actual}, not {expected}" for name, (actual, expected) in shapes.items()]
    lacking = [name for name in checkpointer.misfit.missing_keys if name not in shapes]
    reasons = []
    if wrong:
        reasons.append(f"{len(wrong)} of another shape ({_some(wrong)})")
    if lacking:
        reasons.append(f"{len(lacking)} missing ({_some(lacking)})")
    return " and ".join(reasons)


def _split_query(path: str) -> tuple[str, bool]:
    """The path without Detectron2's query, and whether names are to be matched by their ends."""
    if os.path.exists(os.path.expanduser(path)):  # a name may have a question mark
        return path, False
    file, mark, query = path.partition("?")
    options = query.split("&") if mark else []
    heuristics = [option for option in options if option.startswith(f"{HEURISTICS}=")]
    for option in heuristics:
        if option.lower() not in (f"{HEURISTICS}=true", f"{HEURISTICS}=false"):
            raise InputError(f"checkpoint {path}: {HEURISTICS} must be True or False, got {option.partition('=')[2]!r}")
    remaining = "&".join(option for option in options if option not in heuristics)
    return file + (mark + remaining if remaining else ""), any(option.lower().endswith("true") for option in heuristics)


def _local(path: str, checkpointer: Checkpointer) -> str:
    """A file or a folder on this machine, downloaded where it is not."""
    if path.startswith(HUB):
        return _download(path.removeprefix(HUB))
    path = os.path.expanduser(path)
    local = path if os.path.exists(path) else checkpointer.path_manager.get_local_path(path)
    if not os.path.exists(local):
        raise FileNotFoundError("there is no such file")
    return local


# Either may come in parts, with a list of them in <name>.index.json.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def _download(name: str) -> str:
    """The folder that a model of the Hugging Face hub is kept in, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download

    # Many models are there in both formats: the second is asked for where the first is missing.
    for patterns in (["model*.safetensors*"], ["pytorch_model*.bin*"]):
        folder = snapshot_download(name, allow_patterns=patterns)
        if any(file for pattern in patterns for file in Path(folder).glob(pattern)):
            break
    return folder


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_weights(folder / name)
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside = [part for part in parts if Path(part).name != part]
            if outside:
                raise ValueError(f"its index names {outside[0]}, which is not a file in it")
            return {key: tensor for part in parts for key, tensor in read_weights(folder / part).items()}
    raise FileNotFoundError(f"the folder has neither {' nor '.join(_WEIGHT_FILES)}")


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
