"""A folder of images as a data set without labels."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from hourglass.data.images import read_headers
from hourglass.errors import InputError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def register_folder(folder: str | os.PathLike) -> str:
    """
    Register a folder's images, and those of its folders, with Detectron2; they have ids from 1 in the order of their
    paths.

    Returns:
        the data set's name.

    Raises:
        InputError: for a folder that is missing, or without an image.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise InputError(f"--images must be a folder of images, got {str(folder)!r}, which is no folder")
    paths = sorted(str(path) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(
            f"--images must be a folder of images ({', '.join(SUFFIXES)}), got {str(folder)!r} without one"
        )
    name = f"folder {root}"
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(_load, paths))
    return name


def _load(paths: list[str]) -> list[dict[str, Any]]:
    records = []
    for i, (path, header) in enumerate(zip(paths, read_headers(paths)), start=1):
        if header.problem:
            raise InputError(f"image {path} cannot be read, it {header.problem}")
        height, width = header.upright
        records.append({"file_name": path, "image_id": i, "height": height, "width": width})
    return records
