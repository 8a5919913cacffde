"""Files of weights are data: what they may hold is read, and nothing that they hold is run."""

import argparse
import builtins
import collections
import copyreg
import functools
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from hourglass import InputError
from hourglass.weights import read_weights


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class State:
    """Unpickled, ``kind`` is called without arguments and given a state."""

    def __init__(self, make, args, state):
        self.reduced = make, args, state

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def marker(tmp_path):
    """A file that a command makes if it is run; nothing may have run it in the end."""
    path = tmp_path / "was_run"
    yield path
    assert not path.exists()


def shell(marker) -> Call:
    return Call(os.system, f"touch {marker}")


def save(content, path: Path, **options) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, **options))
    else:
        torch.save(content, path, **options)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        read_weights(path)
    message = str(refused.value)
    assert "\n" not in message and "weights_only" not in message and str(path) in message
    return message


SYSTEM = f"{os.system.__module__}.system"


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".bin", ".pyth"])
@pytest.mark.parametrize("place", ["alone", "nested", "as a key's value in a state"])
def test_a_command_is_not_run(tmp_path, marker, suffix, place):
    content = {
        "alone": shell(marker),
        "nested": {"model": {"weight": [torch.zeros(1), (shell(marker),)]}, "__author__": "third_party"},
        "as a key's value in a state": State(collections.OrderedDict, (), {"_metadata": shell(marker)}),
    }[place]
    assert f"it holds {SYSTEM}: a file of weights must hold only" in refusal(save(content, tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_runs_a_command(tmp_path, marker, protocol):
    assert SYSTEM in refusal(save(shell(marker), tmp_path / "a.pkl", protocol=protocol))


def test_the_older_formats_of_torch_run_nothing(tmp_path, marker):
    path = save(shell(marker), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert SYSTEM in refusal(path)
    assert SYSTEM in refusal(save(shell(marker), tmp_path / "b.pth", pickle_protocol=4))
    with tarfile.open(tmp_path / "c.pth", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(shell(marker))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    assert "a tar archive of torch before 0.2" in refusal(tmp_path / "c.pth")


def test_a_plain_pickle_under_torchs_suffix_runs_nothing(tmp_path, marker):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(shell(marker)))
    with pytest.raises((InputError, pickle.UnpicklingError, RuntimeError, ValueError)):
        read_weights(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_torchscript_is_no_data(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "a.pth")
    assert "a TorchScript program" in refusal(tmp_path / "a.pth")


def test_an_archive_of_torch_is_one_under_any_suffix(tmp_path, marker):
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "a.pth").rename(tmp_path / "a.pkl")
    assert torch.equal(read_weights(tmp_path / "a.pkl")["weight"], torch.ones(2))
    torch.save(shell(marker), tmp_path / "b.pth")
    (tmp_path / "b.pth").rename(tmp_path / "b.pkl")
    assert SYSTEM in refusal(tmp_path / "b.pkl")


@pytest.mark.parametrize(
    "function, args, name",
    [
        (builtins.eval, ("1",), "builtins.eval"),
        (builtins.getattr, (dict, "keys"), "builtins.getattr"),
        (copyreg._reconstructor, (Call, object, None), "copyreg._reconstructor"),
        (functools.partial, (print,), "functools.partial"),
        (torch.load, ("a.pth",), "torch.serialization.load"),
        (np.load, ("a.npy",), "numpy.load"),
        (torch.hub.load, ("a/b", "c"), "torch.hub.load"),
    ],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_other_functions_are_named(tmp_path, suffix, function, args, name):
    assert f"it holds {name}" in refusal(save(Call(function, *args), tmp_path / f"a{suffix}"))


def hand_written(path: Path, *opcodes: bytes) -> Path:
    path.write_bytes(b"".join(opcodes) + b".")
    return path


@pytest.mark.parametrize(
    "opcodes, name",
    [
        ([b"\x80\x04\x8c\x05numpy\x8c\x10ctypeslib.ctypes\x93"], "numpy.ctypeslib.ctypes"),
        ([b"\x80\x04\x8c\x08builtins\x8c\x0bdict.update\x93"], "builtins.dict.update"),
        ([b"(S'touch x'\nios\nsystem\n"], "os.system"),
        ([b"c__builtin__\neval\n(S'1'\ntR"], "builtins.eval"),
        ([b"cnumpy\nndarray\n(I3\ntR"], "a call of numpy.ndarray"),
        ([b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntRS'12345678'\ntR"], "arrays of dtype 'O'"),
        ([b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR"], "a call of _codecs.encode to 'rot13'"),
    ],
)
def test_names_in_other_opcodes(tmp_path, opcodes, name):
    assert name in refusal(hand_written(tmp_path / "a.pkl", *opcodes))


@pytest.mark.parametrize(
    "opcodes",
    [
        [b"cnumpy.core.multiarray\n_reconstruct\n(N}S'make'\nS'x'\nstb"],  # a state for a function that is allowed
        [b"cnumpy.core.multiarray\n_reconstruct\n(}(S'make'\nS'x'\nudtb"],
        [b"ccollections\nOrderedDict\n(N}S'keys'\nS'x'\nstb"],
        [b"Psomething\n"],  # a persistent id
        [struct.pack("<BB", 0x82, 1)],  # a code of copyreg's registry of extensions
        [b"\x97"],  # a buffer from outside
    ],
)
def test_nothing_is_set_and_nothing_is_fetched(tmp_path, opcodes):
    with pytest.raises((AttributeError, TypeError, ValueError, pickle.UnpicklingError)):
        read_weights(hand_written(tmp_path / "a.pkl", *opcodes))
    array = np.arange(3.0)
    assert np.array_equal(read_weights(save(array, tmp_path / "b.pkl")), array)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize(
    "config, name",
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (OmegaConf.create({"lr": 0.1}), "omegaconf"),
        (Path("a"), "pathlib"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (functools.partial(nn.LayerNorm, eps=1e-6), "functools.partial"),
    ],
    ids=["argparse", "omegaconf", "path", "module", "partial"],
)
def test_what_else_a_checkpoint_holds_is_said_and_how_to_leave_it_out(tmp_path, suffix, config, name):
    message = refusal(save({"model": {"weight": torch.zeros(1)}, "args": config}, tmp_path / f"a{suffix}"))
    assert name in message
    assert "torch.save({'model': model.state_dict()}, 'weights.pth')" in message


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float64": np.linspace(0, 1, 5),
    "float16": np.arange(4, dtype=np.float16),
    "int64": np.arange(3),
    "uint8": np.arange(3, dtype=np.uint8),
    "bool": np.array([True, False]),
    "big endian": np.arange(3, dtype=">f4"),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": np.zeros((0, 4), np.float32),
    "no dimension": np.array(1.5, np.float32),
    "text": np.array(["person", "car"]),
    "scalar": np.float32(2.5),
    "integer": np.int64(7),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_read(tmp_path, protocol):
    read = read_weights(save(ARRAYS, tmp_path / "a.pkl", protocol=protocol))
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert type(read[name]) is type(array), name
        assert read[name].dtype.newbyteorder("=") == array.dtype.newbyteorder("="), name
        assert read[name].shape == array.shape and np.array_equal(read[name], array), name


@pytest.mark.parametrize("old, new", [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")])
def test_arrays_of_either_numpy_are_read(tmp_path, old, new):
    content = pickle.dumps(ARRAYS, protocol=2).replace(b"c" + old, b"c" + new)
    assert b"c" + new in content
    (tmp_path / "a.pkl").write_bytes(content)
    assert np.array_equal(read_weights(tmp_path / "a.pkl")["float32"], ARRAYS["float32"])


def test_arrays_of_python_2_are_read(tmp_path):
    """As Caffe2's and Detectron's files have them: bytes as Python 2's text."""
    opcodes = [
        b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        b"\x89U\x08" + struct.pack("<2f", 1.5, -3.25) + b"tbs",
    ]
    read = read_weights(hand_written(tmp_path / "a.pkl", *opcodes))
    assert list(read) == ["conv1_w"] and np.array_equal(read["conv1_w"], np.array([1.5, -3.25], np.float32))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_tensors_and_containers_in_a_pickle_are_read(tmp_path, protocol):
    """As the scripts that bring an ImageNet checkpoint to Detectron2's format write it."""
    model = nn.BatchNorm2d(3)
    content = {
        "model": model.state_dict(),
        "parameter": nn.Parameter(torch.arange(4.0).reshape(2, 2).t()),
        "half": torch.arange(3, dtype=torch.bfloat16),
        "containers": [(1, 2.5), {"a"}, frozenset("b"), b"bytes", bytearray(b"c"), None, True, 1j, torch.Size([1, 2])],
        "default": collections.defaultdict(list, {"x": [1]}),
        "dtype": torch.float16,
        "__author__": "third_party",
        "matching_heuristics": True,
    }
    read = read_weights(save(content, tmp_path / "a.pkl", protocol=protocol))
    assert list(read) == list(content)
    assert all(torch.equal(read["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert read["model"]._metadata == model.state_dict()._metadata
    for name in ("parameter", "half"):
        assert torch.equal(read[name], content[name]) and read[name].dtype == content[name].dtype
    assert read["containers"] == content["containers"] and read["default"] == {"x": [1]}
    assert read["dtype"] is torch.float16


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, None], object),
        np.zeros(2, [("a", "f4"), ("b", "i4")]),
        np.zeros(2, "M8[s]"),
        np.recarray(2, [("a", "f4")]),
    ],
    ids=["objects", "structured", "dates", "a subclass"],
)
def test_arrays_of_no_numbers_are_refused(tmp_path, array):
    assert "numpy" in refusal(save({"weight": array}, tmp_path / "a.pkl"))


def test_a_storage_in_a_pickle_runs_nothing(tmp_path, marker):
    """torch's own function for it reads without a check."""
    inner = io.BytesIO()
    torch.save(shell(marker), inner, _use_new_zipfile_serialization=False)
    content = Call(torch.storage._load_from_bytes, inner.getvalue())
    assert SYSTEM in refusal(save(content, tmp_path / "a.pkl"))


def test_damage_is_no_refusal_of_what_it_holds(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as damaged, zipfile.ZipFile(tmp_path / "a.pth") as archive:
        for name in archive.namelist():
            data = archive.read(name)
            damaged.writestr(name, data[:-9] if name.endswith("data.pkl") else data)
    (tmp_path / "c.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(ARRAYS)[:-20])
    for name in ("b.pth", "c.pth", "d.pkl"):
        with pytest.raises(Exception) as refused:
            read_weights(tmp_path / name)
        assert not isinstance(refused.value, InputError) and "weights_only" not in str(refused.value)
