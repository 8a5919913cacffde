"""Reading files of weights as data: nothing that is in a file is run."""

import io
import os
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import torch

from hourglass.errors import InputError

SAVE_ALONE = "torch.save({'model': model.state_dict()}, 'weights.pth')"


def read_weights(path: str | os.PathLike, kind: str = "checkpoint") -> Any:
    """
    Read a file of weights. What is in it decides how: torch's archives and its older format with ``weights_only``,
    safetensors, and pickles (``.pkl``, as in Detectron2's, Detectron's and Caffe2's model zoos) as far as they are made
    of numpy arrays and scalars, torch tensors, numbers, text and containers of these.

    Args:
        path: a file.
        kind: what it is, for messages.

    Returns:
        the content; tensors lie on the CPU, arrays are numpy's own.

    Raises:
        InputError: for a file with anything else in it, such as a function or an object of a class; it says which.
        Exception: whatever a file system, or a reader of a damaged file, may raise.
    """
    path = os.fspath(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with open(path, "rb") as file:
            if path.endswith(".pkl") and not zipfile.is_zipfile(file):
                file.seek(0)
                return _unpickle(file)
            return _torch_load(file)
    except _Foreign as error:
        raise InputError(
            f"{kind} {path} is not read, it holds {error}: a file of weights must hold only arrays, tensors and "
            f"containers of them. Save the weights alone where it was made: {SAVE_ALONE}"
        ) from error


class _Foreign(Exception):
    """Names what is not data."""


def _torch_load(file: IO[bytes]) -> Any:
    file.seek(0)
    archive = zipfile.ZipFile(file) if zipfile.is_zipfile(file) else None
    if archive is not None and any(name.endswith("/constants.pkl") for name in archive.namelist()):
        # Older releases of torch load it in spite of weights_only.
        raise _Foreign("a TorchScript program")
    file.seek(0)
    if archive is None and _is_tar(file):
        # Likewise: up to torch 2.5 these are unpickled without a check (CVE-2025-32434).
        raise _Foreign("a tar archive of torch before 0.2")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        file.seek(0)
        foreign = _foreign_names(archive, file)
        if not foreign:  # torch's own words would advise to read it without the check
            raise pickle.UnpicklingError("its pickle is damaged, or of a kind that torch does not read") from error
        suffix = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise _Foreign(", ".join(foreign[:3]) + suffix) from error


def _is_tar(file: IO[bytes]) -> bool:
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        return False
    return True


# What weights_only takes, so that it is not what a file is refused for.
_OF_TORCH = re.compile(
    r"collections\.OrderedDict|torch\.(Size|device|[a-z]+\d+\w*|\w+Storage|storage\.\w+Storage|_utils\._rebuild_\w+"
    r"|_tensor\._rebuild_\w+|nn\.parameter\.Parameter)"
)


def _foreign_names(archive: zipfile.ZipFile | None, file: IO[bytes]) -> list[str]:
    """The functions and classes that a file of torch asks for beside torch's own; they are looked for, not at."""
    if archive is None:
        pickles = [file] * 4  # in the older format a magic number, a version and the system stand before the content
    else:
        pickles = [archive.open(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    names = {}
    try:
        for pickled in pickles:
            names.update(dict.fromkeys(_names(pickled)))
    except ValueError:  # the pickle ends, or is none
        pass
    return [name for name in names if not _OF_TORCH.fullmatch(name)]


def _names(file: IO[bytes]) -> Iterator[str]:
    """The dotted names that a pickle asks for, in order."""
    texts: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = argument.partition(" ")
            yield f"{_RENAMED.get(module, module)}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(str(text) for text in texts[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else None
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = texts[-1] if texts else None
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            texts.append(memo.get(argument))
        elif isinstance(argument, str):
            texts.append(argument)


def _unpickle(file: IO[bytes]) -> Any:
    # Detectron's files are Python 2's.
    return _plain(_Unpickler(file, encoding="latin1").load())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = _RENAMED.get(module, module)
        try:
            return _MAKERS[module, name]
        except KeyError:
            raise _Foreign(f"{module}.{name}") from None


class _Maker:
    """
    What a pickle may call. As the pickle holds only this, and cannot set anything on it, it changes nothing that other
    code uses.
    """

    __slots__ = ("make",)

    def __init__(self, make: Callable):
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function cannot be given a state")


class _DType:
    """
    A dtype in a pickle. numpy's own takes any state, also one whose values are taken for addresses, so this stands for
    it until it is known to be a number's or a text's.
    """

    def __init__(self, spec: str, align: bool = False, copy: bool = False):
        self.dtype = np.dtype(spec) if isinstance(spec, str) else None
        if self.dtype is None or self.dtype.kind not in "biufcSU":
            raise _Foreign(f"numpy arrays of dtype {spec!r}")

    def __setstate__(self, state: tuple) -> None:
        _, order, *structure = state
        if any(part is not None for part in structure[:3]):
            raise _Foreign("numpy arrays of a structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array that is filled from a pickle."""

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran, values = state[-4:]
        filled: Any = (1, _shape(shape), dtype.dtype, bool(fortran), _bytes(values))
        super().__setstate__(filled)


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _from_buffer(values: Any, dtype: _DType, shape: Any, order: str) -> np.ndarray:
    axes: Any = order
    return np.frombuffer(values, dtype.dtype).reshape(_shape(shape), order=axes)


def _scalar(dtype: _DType, value: Any) -> np.generic:
    return np.frombuffer(_bytes(value), dtype.dtype, count=1)[0]


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(isinstance(length, int) and length >= 0 for length in shape):
        raise pickle.UnpicklingError(f"an array has the shape {shape!r}")
    return shape


def _bytes(values: Any) -> bytes:
    if isinstance(values, str):  # of Python 2
        return values.encode("latin1")
    if not isinstance(values, bytes | bytearray):
        raise pickle.UnpicklingError(f"the values of an array are a {type(values).__name__}, not bytes")
    return bytes(values)


def _storage(values: bytes) -> Any:
    """Tensors in a plain pickle keep their values as torch.save writes a storage."""
    return _torch_load(io.BytesIO(_bytes(values)))


def _no_call(name: str) -> _Maker:
    """For what is named as an argument, and never called."""

    def refuse(*args: Any) -> None:
        raise _Foreign(f"a call of {name}")

    return _Maker(refuse)


def _encode(text: str, encoding: str) -> bytes:
    """How bytes are written in protocols that have none."""
    if encoding != "latin1":
        raise _Foreign(f"a call of _codecs.encode to {encoding!r}")
    return text.encode("latin1")


# Python 2's names, and numpy's before its second release.
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}

_MAKERS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Maker(_reconstruct),
    ("numpy.core.multiarray", "scalar"): _Maker(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Maker(_from_buffer),
    ("numpy", "ndarray"): _no_call("numpy.ndarray"),
    ("numpy", "dtype"): _Maker(_DType),
    ("torch._utils", "_rebuild_tensor"): _Maker(torch._utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Maker(torch._utils._rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Maker(_storage),
    ("torch", "Size"): _Maker(torch.Size),
    ("collections", "OrderedDict"): OrderedDict,
    # The function that makes its missing values is left out.
    ("collections", "defaultdict"): _Maker(lambda *args: {}),
    ("_codecs", "encode"): _Maker(_encode),
}
# Python does not let a pickle set anything on its own types.
_MAKERS |= {
    ("builtins", kind.__name__): kind for kind in (bytearray, bytes, complex, dict, frozenset, list, set, tuple)
}
_MAKERS |= {("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


def _plain(content: Any) -> Any:
    """The same with numpy's own arrays."""
    if isinstance(content, _Array):
        return content.view(np.ndarray)
    if isinstance(content, _DType):
        return content.dtype
    if isinstance(content, dict):
        for key, value in content.items():
            content[key] = _plain(value)
    elif type(content) in (list, tuple):
        return type(content)(map(_plain, content))
    return content
