"""Data loaders that say in one line what is wrong with the data."""

import difflib
import os
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.registry import locate
from omegaconf import DictConfig

from hourglass.errors import InputError

# What the files are that a record may name.
FILES = {"file_name": "images", "pan_seg_file_name": "panoptic PNGs", "sem_seg_file_name": "semantic PNGs"}


class ReadableMapper:
    """
    A dataset mapper that names the image that it cannot read.

    Args:
        mapper: dataset dictionary -> input dictionary.
    """

    def __init__(self, mapper):
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.mapper(record)
        except (OSError, SyntaxError) as error:  # Pillow raises either for bad files
            reason = str(error).split("\n")[0]
            path = record.get("file_name")
            raise InputError(f"image {path} cannot be read ({type(error).__name__}: {reason})") from error


def build_loader(node: DictConfig, max_images: int | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """
    Build a data loader from the LazyCall of Detectron2's ``build_detection_train_loader`` or ``..._test_loader``.

    Args:
        node: the call, with ``dataset`` and ``mapper``.
        max_images: only the first so many images; None: all.

    Returns:
        the loader, and the records that it reads.

    Raises:
        InputError: for a data set that is not registered or not there, or without an image.
    """
    records = load_records(node, max_images)
    return load_images(node, records), records


def load_records(node: DictConfig, max_images: int | None = None) -> list[dict[str, Any]]:
    """
    The records of the data set that ``node``, as in :func:`build_loader`, reads.

    Raises:
        InputError: for a data set that is not registered or not there, or without an image.
    """
    name = node.dataset.get("names", "")
    if name:
        _check_registered([name] if isinstance(name, str) else list(name))
    try:
        records = instantiate(node.dataset)[:max_images]
    except InputError:
        raise
    except (AssertionError, KeyError, OSError, ValueError) as error:  # what Detectron2's loaders raise for bad files
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"data set {name!r} cannot be loaded ({type(error).__name__}: {reason})") from error
    if not records:
        raise InputError(f"data set {name!r} has no image to run on")
    for key, kind in FILES.items():
        paths = [record[key] for record in records if key in record]
        missing = [path for path in paths if not _is_there(path)]
        if missing:
            what = f"{len(missing)} of the {len(paths)} {kind} of data set {name!r}"
            raise InputError(f"{what} are missing, such as {missing[0]} ({_where(name)})")
    return records


def load_images(node: DictConfig, records: list[dict[str, Any]]) -> Any:
    """The loader of ``node``, as in :func:`build_loader`, for these records alone; empty where there are none."""
    if not records:  # Detectron2's samplers take at least one
        return []
    arguments = {key: instantiate(node[key]) for key in node if key not in ("_target_", "dataset", "mapper")}
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    return target(dataset=records, mapper=ReadableMapper(instantiate(node.mapper)), **arguments)


def _check_registered(names: list[str]) -> None:
    for name in names:
        if name not in DatasetCatalog.list():
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "a config file can register it"
            raise InputError(f"data set {name!r} is not registered with Detectron2: {hint}")
        metadata = MetadataCatalog.get(name)
        parts = ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root")
        expected = [path for part in parts if (path := getattr(metadata, part, None))]
        for path in expected:
            if not _is_there(path):
                what = f"{path} is missing; {' and '.join(expected)} are expected"
                raise InputError(f"data set {name!r} is not there: {what} ({_where(name)})")


def _is_there(path: str) -> bool:
    return "://" in path or os.path.exists(path)


def _where(name: str | list[str]) -> str:
    """What says where the data set is; its metadata may name an environment variable of its own for that."""
    first = name if isinstance(name, str) else name[0]
    own = MetadataCatalog.get(first).get("variable") if first else None
    if own and os.environ.get(own):
        return f"{own} is {os.environ[own]!r}"
    unset = f"{own} is not set, and " if own else ""
    root = os.environ.get("DETECTRON2_DATASETS")
    if root:
        return f"{unset}DETECTRON2_DATASETS is {root!r}"
    return f"{unset}DETECTRON2_DATASETS is not set, so 'datasets' is read"
