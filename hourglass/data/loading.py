"""Data loaders that say in one line what is wrong with the data."""

import difflib
import os
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig
from PIL import UnidentifiedImageError

from hourglass.errors import InputError


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
        except (OSError, SyntaxError, UnidentifiedImageError) as error:  # Pillow raises each of them for bad files
            reason = str(error).split("\n")[0]
            raise InputError(
                f"image {record.get('file_name')} cannot be read ({type(error).__name__}: {reason})"
            ) from error


def check_datasets(names: str | list[str] | tuple[str, ...]) -> None:
    """
    Args:
        names: of data sets registered with Detectron2.

    Raises:
        InputError: for a data set that is not registered, or whose annotations or images are missing.
    """
    for name in [names] if isinstance(names, str) else names:
        if name not in DatasetCatalog.list():
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
            raise InputError(
                f"data set {name!r} is not registered with Detectron2"
                + (f": did you mean {near[0]!r}?" if near else ": a config file can register it")
            )
        metadata = MetadataCatalog.get(name)
        for part in ("json_file", "image_root"):
            path = getattr(metadata, part, None)
            if path and "://" not in path and not os.path.exists(path):
                root = os.environ.get("DETECTRON2_DATASETS")
                where = (
                    f"DETECTRON2_DATASETS is {root!r}"
                    if root
                    else "DETECTRON2_DATASETS is not set, so 'datasets' is read"
                )
                raise InputError(f"data set {name!r} is not there: {path} is expected and missing ({where})")


def build_loader(node: DictConfig, max_images: int | None = None):
    """
    Build a data loader from the LazyCall of Detectron2's ``build_detection_train_loader`` or ``..._test_loader``.

    Args:
        node: the call, with ``dataset`` and ``mapper``.
        max_images: only the first so many images; None: all.

    Returns:
        the loader, and the ids of its images.

    Raises:
        InputError: for data that is missing, or a data set without an image.
    """
    call = {key: node[key] for key in node if key not in ("_target_", "dataset", "mapper")}
    arguments = {key: instantiate(value) for key, value in call.items()}
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    if "names" in node.dataset:
        names = node.dataset.names
        check_datasets(list(names) if isinstance(names, ListConfig) else names)
    records = instantiate(node.dataset)[:max_images]
    if not records:
        raise InputError(f"data set {node.dataset.get('names', '')!r} has no image to run on")
    missing = [record["file_name"] for record in records if not os.path.exists(record["file_name"])]
    if missing:
        raise InputError(f"{len(missing)} of the data set's {len(records)} images are missing, such as {missing[0]}")
    loader = target(dataset=records, mapper=ReadableMapper(instantiate(node.mapper)), **arguments)
    return loader, [record["image_id"] for record in records]
