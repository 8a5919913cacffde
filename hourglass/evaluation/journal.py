"""
The finished batches of a comparison on disk, from which an interrupted one continues.

    FOLDER/journal/DIGEST/settings.json       what determines the figures; DIGEST is of it
    FOLDER/journal/DIGEST/R_of_N.msgpack      of process R of N: a record a batch, appended when all models have run

A record is its length and its checksum (CRC-32), four bytes each, and MessagePack, which keeps every bit of a float and
takes a tenth of JSON's time. Whatever follows the last whole record is dropped.
"""

import hashlib
import json
import logging
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from hourglass.data.loading import FILES
from hourglass.errors import InputError
from hourglass.evaluation.environment import describe_environment
from hourglass.files import write_whole

# Length and checksum.
_HEAD = struct.Struct("<II")

_logger = logging.getLogger(__name__)


class Journal:
    """
    The records of the batches that all models have run on, as this process appends them.

    Every process of a distributed job opens it, with the same arguments.

    Args:
        folder: where ``journal/`` is; it need not exist before the first record.
        settings: name -> what the figures depend on, as JSON has it. Records made under others are not read.
        resume: go on from the records that are there; False: they are dropped.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], resume: bool):
        self._root = Path(folder) / "journal"
        # Those of the main process: machines of one job may differ in what does not matter.
        self._settings = comm.all_gather(dict(settings))[0]
        self._folder = self._root / digest(self._settings)[:16]
        self._path = self._folder / f"{comm.get_rank()}_of_{comm.get_world_size()}.msgpack"
        self._file: BinaryIO | None = None
        if comm.is_main_process():
            if resume and not self._folder.exists():
                _logger.warning("nothing to resume, starting anew: %s", self._explain_new_start())
            if not resume and self._folder.exists():
                paths = self._folder.glob("*.msgpack")
                finished = sum(len(record["image_ids"]) for path in paths for record, _ in read_records(path))
                _logger.warning("starting anew, %d finished images are dropped: --resume would go on", finished)
                shutil.rmtree(self._folder)
        comm.synchronize()
        mine, length = set(), 0
        for record, end in self._scan():
            mine.update(record["image_ids"])
            length = end
        self._length = length
        #: The ids of the images that are finished, by any process.
        self.done: set[Any] = set().union(*comm.all_gather(mine))

    def _scan(self) -> Iterator[tuple[dict[str, Any], int]]:
        if self._path.exists():
            yield from read_records(self._path)

    def _explain_new_start(self) -> str:
        settings_files = sorted(self._root.glob("*/settings.json"), key=lambda path: path.stat().st_mtime)
        if not settings_files:
            return f"{self._root} has no interrupted run"
        before = _flatten(json.loads(settings_files[-1].read_text()))
        current = _flatten(json.loads(json.dumps(self._settings)))
        differing = []
        for name in {**before, **current}:
            values = [repr(settings.get(name)) for settings in (before, current)]
            if values[0] != values[1]:
                # Checksums and long lists tell a reader nothing.
                is_short = max(map(len, values)) <= 30
                differing.append(f"{name} (was {values[0]}, is {values[1]})" if is_short else name)
        ellipsis = ", ..." if len(differing) > 5 else ""
        return f"the interrupted run in {self._root} differs in {', '.join(differing[:5])}{ellipsis}"

    def records(self) -> Iterator[dict[str, Any]]:
        """This process's records, in the order in which they were appended."""
        for record, _ in self._scan():
            yield record

    def append(self, record: dict[str, Any]) -> None:
        """
        Args:
            record: with "image_ids"; as MessagePack has it.

        Raises:
            InputError: where the file cannot be written, such as on a full disk.
        """
        packed = msgpack.packb(record)
        remaining = memoryview(_HEAD.pack(len(packed), zlib.crc32(packed)) + packed)
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            # Past Python's buffer, so that a process that is killed has lost nothing that it appended.
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise InputError(f"{self._path} cannot be written ({error.strerror}); {self.describe()}") from error
        self.done.update(record["image_ids"])

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if comm.is_main_process() and not (self._folder / "settings.json").exists():
            write_whole(self._folder / "settings.json", json.dumps(self._settings, indent=2) + "\n")
        self._file = open(self._path, "ab", buffering=0)
        self._file.truncate(self._length)

    def describe(self) -> str:
        """What an interruption leaves, and how to go on."""
        images = f"{len(self.done)} finished image{'s are' if len(self.done) != 1 else ' is'}"
        return f"{images} kept in {self._root}, --resume goes on from there"

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(self.describe()) from None

    def remove(self) -> None:
        """The comparison is reported, how it came about is not needed any more. For the main process."""
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._root.rmdir()
        except OSError:  # it has journals of other settings, or was never made
            pass


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole records that the file begins with, each with the number of bytes up to its end."""
    with open(path, "rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, checksum = _HEAD.unpack(head)
            packed = file.read(length)
            # No record is empty; the zeros that a crash may leave would be some.
            if not length or len(packed) < length or zlib.crc32(packed) != checksum:
                return
            yield msgpack.unpackb(packed, strict_map_key=False), file.tell()


def can_dump(evaluator: DatasetEvaluator) -> bool:
    """Whether :func:`dump` knows what the evaluator keeps of an image."""
    return hasattr(evaluator, "dump") or type(evaluator) is COCOEvaluator


def dump(evaluator: DatasetEvaluator, image_id: Any) -> Any:
    """What the evaluator keeps of the image that it has just processed, as JSON has it."""
    if hasattr(evaluator, "dump"):
        return evaluator.dump(image_id)
    predictions = evaluator._predictions
    return predictions[-1] if predictions and predictions[-1]["image_id"] == image_id else None


def restore(evaluator: DatasetEvaluator, image_id: Any, record: Any) -> None:
    """Give the evaluator what :func:`dump` returned."""
    if hasattr(evaluator, "restore"):
        evaluator.restore(image_id, record)
    elif record is not None:
        evaluator._predictions.append(record)


def open_journal(
    cfg: DictConfig, subjects: Mapping[str, Any], plans: Mapping[str, Any], records: list[dict], resume: bool
) -> Journal | None:
    """
    The journal of a comparison in ``cfg.train.output_dir``.

    Args:
        cfg: with ``model``, ``dataloader.test``, ``dataloader.evaluator``, ``evaluation`` and ``train``.
        subjects: name -> :class:`~hourglass.evaluation.compare.Subject`.
        plans: name -> plan.
        records: of the images to be compared.
        resume: go on from what is there.

    Returns:
        None, with a warning, where an evaluator does not tell what it keeps of an image.
    """
    evaluators = [member for subject in subjects.values() for member in members(subject.evaluator)]
    closed = next((member for member in evaluators if not can_dump(member)), None)
    if closed is not None:
        name = type(closed).__name__
        _logger.warning("%s has no dump() and restore(): an interrupted run of it starts anew", name)
        return None
    models = [subject.model for subject in subjects.values()]
    config = {"model": cfg.model, "test": cfg.dataloader.test, "evaluator": cfg.dataloader.evaluator}
    config = {name: to_plain(node) for name, node in {**config, "evaluation": cfg.evaluation}.items()}
    config["test"].pop("num_workers", None)  # images are the same, and they are read before the clock starts
    config["evaluation"].get("report", {}).pop("images", None)  # are chosen afterwards
    config["image_scaling"] = cfg.dataloader.get("image_scaling", "full")
    settings = {
        "weights": digest_weights(models),
        "evaluators": {
            name: [_describe_evaluator(member) for member in members(subject.evaluator)]
            for name, subject in subjects.items()
        },
        "plans": {name: plan.describe() for name, plan in plans.items()},
        "data": digest_data(records),
        "config": config,
        "environment": describe_environment(cfg.train.device),
        "code": digest_code(models),
    }
    return Journal(cfg.train.output_dir, settings, resume)


def _describe_evaluator(evaluator: DatasetEvaluator) -> str:
    """Its type, and what it leaves out of an image."""
    lowest = getattr(evaluator, "lowest", 0)
    return f"{type(evaluator).__name__}{f' over {lowest}' if lowest else ''}"


def members(evaluator: DatasetEvaluator) -> list[DatasetEvaluator]:
    """The evaluators that one of them may consist of."""
    return evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]


def digest(value: Any) -> str:
    """A checksum of plain values; of others their text, of arrays their contents."""

    def plain(item: Any) -> Any:
        if isinstance(item, (np.ndarray, np.generic)):
            return [str(item.dtype), item.shape, hashlib.blake2b(np.ascontiguousarray(item).data).hexdigest()]
        return str(item)

    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=plain).encode(), digest_size=16).hexdigest()


def digest_weights(models: Iterable[nn.Module]) -> str:
    """A checksum of the names and values in the models' ``state_dict()``; what they share is read once."""
    checksums: dict[Any, str] = {}
    total = hashlib.blake2b(digest_size=16)
    for model in models:
        for name, value in model.state_dict().items():
            if not isinstance(value, torch.Tensor):
                total.update(digest([name, value]).encode())
                continue
            key = value.data_ptr(), value.dtype, value.shape, value.stride()
            if key not in checksums:
                contents = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                checksums[key] = hashlib.blake2b(contents.data, digest_size=16).hexdigest()
            total.update(f"{name} {value.dtype} {tuple(value.shape)} {checksums[key]}\n".encode())
    return total.hexdigest()


def digest_data(records: list[dict[str, Any]]) -> str:
    """A checksum of a data set's records, and of the sizes and times of the files that these name."""
    files = [path for record in records for key in FILES if (path := record.get(key)) and os.path.exists(path)]
    states = [os.stat(path) for path in files]
    return digest([records, files, [(state.st_size, state.st_mtime_ns) for state in states]])


def digest_code(models: Iterable[nn.Module]) -> str:
    """A checksum of the source files of this package and of the models' classes."""
    package = sorted(Path(__file__).parents[1].rglob("*.py"))
    modules = {type(module).__module__ for model in models for module in model.modules()}
    sources = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
    files = dict.fromkeys([*map(str, package), *filter(None, sources)])
    return digest([hashlib.blake2b(Path(file).read_bytes()).hexdigest() for file in files if os.path.isfile(file)])


def to_plain(node: Any) -> Any:
    """A config as plain values: callables by their names, other objects by their types and attributes."""
    if OmegaConf.is_config(node):
        try:
            node = OmegaConf.to_container(node, resolve=True)
        except OmegaConfBaseException:  # it refers to what only another node has
            node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        return {str(key): to_plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [to_plain(value) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, partial):  # whose text has an address, another one in each process
        return [to_plain(part) for part in (node.func, node.args, node.keywords)]
    if hasattr(node, "__qualname__"):
        return f"{node.__module__}.{node.__qualname__}"
    return [to_plain(type(node)), to_plain(getattr(node, "__dict__", None)) or str(node)]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }
