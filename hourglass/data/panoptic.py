"""
Panoptic data sets in COCO's layout: one JSON with the categories and each image's segments, one PNG an image with their
ids (R + 256 G + 65536 B, 0 where there is none). Categories are read from the JSON, so that any such data set can be
registered without a table of names.
"""

import functools
import json
import logging
import os
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image

from hourglass.checks import repeated
from hourglass.errors import InputError

logger = logging.getLogger(__name__)


class PanopticTruth(NamedTuple):
    """
    A panoptic JSON.

    Attributes:
        images: image id -> COCO's record of the image; empty where the JSON has none.
        annotations: image id -> {"image_id", "file_name", "segments_info"}.
        categories: category id -> {"id", "name", "isthing"}, in the order of the ids.
    """

    images: dict[Any, dict[str, Any]]
    annotations: dict[Any, dict[str, Any]]
    categories: dict[int, dict[str, Any]]


def read_panoptic_json(path: str) -> PanopticTruth:
    """
    Read and check a panoptic JSON. The same file gives the same object: it is not to be changed.

    A missing ``iscrowd`` counts as 0, with a warning; ``area`` and ``bbox`` are not needed, and not checked.

    Raises:
        InputError: for a file that is missing or not JSON, lacks an entry, has an id more than once or one that is no
            whole number, or segments of unknown categories.
    """
    try:
        local = PathManager.get_local_path(path)
        status = os.stat(local)
    except OSError as error:
        raise InputError(f"panoptic JSON {path} cannot be read ({type(error).__name__})") from error
    return _read_panoptic_json(local, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)  # each of the models that are compared asks for it
def _read_panoptic_json(path: str, modified: int, size: int) -> PanopticTruth:
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"panoptic JSON {path} cannot be read ({type(error).__name__}: {reason})") from error
    for key in ("annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            keys = sorted(content) if isinstance(content, dict) else type(content).__name__
            problem = f"has no list {key!r}, it has {keys}"
            raise InputError(f"panoptic JSON {path} {problem}: it must be in COCO's panoptic format")
    try:
        _check_unique(path, "category", [category["id"] for category in content["categories"]])
        _check_unique(path, "image", [image["id"] for image in content.get("images") or []])
        _check_unique(path, "annotated image", [annotation["image_id"] for annotation in content["annotations"]])
        categories = {
            category["id"]: {key: category[key] for key in ("id", "name", "isthing")}
            for category in sorted(content["categories"], key=lambda category: category["id"])
        }
        annotations = {
            annotation["image_id"]: {key: annotation[key] for key in ("image_id", "file_name", "segments_info")}
            for annotation in content["annotations"]
        }
        _check_segments(path, annotations, categories)
        images = {image["id"]: image for image in content.get("images") or []}
    except (KeyError, TypeError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else f"is not in COCO's panoptic format: {error}"
        raise InputError(f"panoptic JSON {path}: an entry {problem}") from error
    return PanopticTruth(images, annotations, categories)


def _check_unique(path: str, kind: str, ids: list) -> None:
    twice = repeated(ids)
    if twice:
        raise InputError(f"panoptic JSON {path}: {len(twice)} {kind} ids occur more than once, such as {twice[0]!r}")
    kinds = {type(id).__name__ for id in ids}
    if not (kinds <= {"int"} or kinds <= {"str"} and "image" in kind):
        first = next(id for id in ids if type(id) is not int)
        raise InputError(f"panoptic JSON {path}: {kind} ids must be whole numbers, got {first!r}")


def _check_segments(path: str, annotations: dict[Any, dict], categories: dict[int, dict]) -> None:
    """Ids and categories; the area and box are not read, as they can be counted."""
    missing_crowd, total = [], 0
    for image_id, annotation in annotations.items():
        ids = set()
        for segment in annotation["segments_info"]:
            total += 1
            missing = {"id", "category_id"} - set(segment)
            if missing:
                raise InputError(f"panoptic JSON {path}: a segment of image {image_id} has no {min(missing)!r}")
            place = f"segment {segment['id']!r} of image {image_id}"
            if type(segment["id"]) is not int or not 0 < segment["id"] < 256**3:
                raise InputError(f"panoptic JSON {path}: {place} must have a whole number from 1 to {256**3 - 1}")
            if segment["id"] in ids:
                raise InputError(f"panoptic JSON {path}: {place} occurs more than once")
            ids.add(segment["id"])
            if segment["category_id"] not in categories:
                problem = f"category_id {segment['category_id']!r}, which is none of {list(categories)}"
                raise InputError(f"panoptic JSON {path}: {place} has {problem}")
            if segment.get("iscrowd") is None:
                missing_crowd.append(place)
                segment["iscrowd"] = 0
            elif segment["iscrowd"] not in (0, 1):
                raise InputError(
                    f"panoptic JSON {path}: {place} has iscrowd {segment['iscrowd']!r}, which must be 0 or 1"
                )
    if missing_crowd and comm.is_main_process():
        line = f"{len(missing_crowd)} of the {total} segments have no iscrowd, such as {missing_crowd[0]}: 0 is assumed"
        logger.warning(f"panoptic JSON {path}: {line}")


def read_panoptic_png(path: str) -> np.ndarray:
    """
    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: for a file that is missing or no such image.
    """
    colours = np.asarray(_open_png(path))
    if colours.ndim != 3 or colours.shape[-1] < 3 or colours.dtype != np.uint8:
        raise InputError(f"panoptic PNG {path} is {colours.shape} {colours.dtype}: it must be 8 bit RGB")
    return colours[..., :3]


def read_panoptic_ids(path: str) -> np.ndarray:
    """
    :func:`segment_ids` of :func:`read_panoptic_png`, in two thirds of the time.

    Returns:
        (H, W) uint32.

    Raises:
        InputError: as there.
    """
    image = _open_png(path)
    if image.mode != "RGB":
        return segment_ids(read_panoptic_png(path)).astype(np.uint32)
    # Pillow has four bytes for each pixel, whose last is of no colour.
    four = np.frombuffer(image.tobytes("raw", "RGBX"), "<u4")
    return (four & 0xFFFFFF).reshape(image.height, image.width)


def _open_png(path: str) -> Image.Image:
    try:
        with PathManager.open(path, "rb") as file:
            image = Image.open(file)
            image.load()
    except FileNotFoundError as error:
        raise InputError(f"panoptic PNG {path} is missing") from error
    except (OSError, SyntaxError) as error:  # Pillow raises either for bad files
        reason = str(error).split("\n")[0]
        raise InputError(f"panoptic PNG {path} cannot be read ({type(error).__name__}: {reason})") from error
    return image


def segment_ids(colours: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) int64, the ids that COCO's panoptic format codes as colours."""
    # The bytes of a number, its lowest first: ten times as fast as a sum of three products.
    four = np.zeros((*colours.shape[:-1], 4), np.uint8)
    four[..., :3] = colours
    return four.view("<u4")[..., 0].astype(np.int64)


class PanopticMetadata(Metadata):
    """
    Metadata under Detectron2's names. Those that come from ``panoptic_json`` are read when they are first asked for.

    Contiguous ids count all categories in the order of their ids: things and stuff share one range, as in Detectron2's
    ``coco_2017_val_panoptic`` and Mask2Former's ``ade20k_panoptic_val``.
    """

    @property
    def categories(self) -> list[dict[str, Any]]:
        """Every category's {"id", "name", "isthing"}, by contiguous id."""
        return list(read_panoptic_json(self.panoptic_json).categories.values())

    @property
    def thing_dataset_id_to_contiguous_id(self) -> dict[int, int]:
        return {category["id"]: i for i, category in enumerate(self.categories) if category["isthing"]}

    @property
    def stuff_dataset_id_to_contiguous_id(self) -> dict[int, int]:
        """Things too: `SemSegEvaluator` looks up every class here."""
        return {category["id"]: i for i, category in enumerate(self.categories)}

    @property
    def thing_classes(self) -> list[str]:
        """Names by contiguous id: the things alone where they come first, all categories where they do not."""
        count = sum(bool(category["isthing"]) for category in self.categories)
        first = all(category["isthing"] for category in self.categories[:count])
        return self.stuff_classes[:count] if first else self.stuff_classes

    @property
    def stuff_classes(self) -> list[str]:
        return [category["name"] for category in self.categories]


def register_panoptic(
    name: str,
    image_root: str | os.PathLike,
    panoptic_json: str | os.PathLike,
    panoptic_root: str | os.PathLike,
    instances_json: str | os.PathLike | None = None,
    sem_seg_root: str | os.PathLike | None = None,
) -> None:
    """
    Register a panoptic data set with Detectron2, under `name`. Nothing is read before it is asked for.

    Its records are those of Detectron2's ``coco_2017_val_panoptic``, and hold what other evaluators need too, so that
    one run gives panoptic quality, instance AP and mIoU.

    Args:
        name: of the data set, not registered yet.
        image_root: the folder of the images, named as in the JSON's "images", or else as the PNGs, with ".jpg".
        panoptic_json: in COCO's panoptic format.
        panoptic_root: the folder of the PNGs.
        instances_json: instances in COCO's format, with the same image and category ids; None: no instance annotations.
        sem_seg_root: a folder of PNGs of contiguous class ids, named as the panoptic ones; None: no semantic ones.
    """
    metadata = PanopticMetadata(
        name=name,
        image_root=os.fspath(image_root),
        panoptic_json=os.fspath(panoptic_json),
        panoptic_root=os.fspath(panoptic_root),
    )
    if instances_json is not None:
        metadata.json_file = os.fspath(instances_json)
    if sem_seg_root is not None:
        metadata.sem_seg_root = os.fspath(sem_seg_root)
    register_panoptic_metadata(metadata)


def register_panoptic_metadata(metadata: PanopticMetadata) -> None:
    """Register the data set that `metadata` describes, under ``metadata.name``."""
    metadata.set(evaluator_type="coco_panoptic_seg", label_divisor=1000, ignore_label=255)
    DatasetCatalog.register(metadata.name, functools.partial(load_panoptic, metadata))
    MetadataCatalog[metadata.name] = metadata


def load_panoptic(metadata: PanopticMetadata) -> list[dict[str, Any]]:
    """
    Returns:
        a record an image: "file_name", "image_id", "height" and "width" where the JSON has them, "pan_seg_file_name",
        "segments_info" with contiguous "category_id" and "isthing"; with instances "annotations", with semantic ground
        truth "sem_seg_file_name".

    Raises:
        InputError: for a JSON that is none, or instances of other categories.
    """
    truth = read_panoptic_json(metadata.panoptic_json)
    contiguous = metadata.stuff_dataset_id_to_contiguous_id
    instances = _load_instances(metadata) if metadata.get("json_file") else None
    image_root, panoptic_root, sem_seg_root = (
        metadata.get(root) for root in ("image_root", "panoptic_root", "sem_seg_root")
    )
    records = []
    for image_id, annotation in truth.annotations.items():
        image: dict[str, Any] = truth.images.get(image_id, {})
        stem = os.path.splitext(annotation["file_name"])[0]
        record: dict[str, Any] = {
            "file_name": os.path.join(image_root, image.get("file_name", f"{stem}.jpg")),
            **{key: image[key] for key in ("height", "width") if key in image},
            "image_id": image_id,
            "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
            "segments_info": [
                {
                    "iscrowd": 0,
                    **segment,
                    "category_id": contiguous[segment["category_id"]],
                    "isthing": bool(truth.categories[segment["category_id"]]["isthing"]),
                }
                for segment in annotation["segments_info"]
            ],
        }
        if instances is not None:
            record["annotations"] = instances.get(image_id, [])
        if sem_seg_root:
            record["sem_seg_file_name"] = os.path.join(sem_seg_root, f"{stem}.png")
        records.append(record)
    return records


def _load_instances(metadata: PanopticMetadata) -> dict[Any, list[dict[str, Any]]]:
    contiguous = metadata.thing_dataset_id_to_contiguous_id
    instances = {}
    try:
        records = load_coco_json(metadata.json_file, metadata.image_root)
    except (AssertionError, KeyError, OSError, ValueError) as error:  # what it raises for bad files
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise InputError(f"instances JSON {metadata.json_file} cannot be read ({reason})") from error
    for record in records:
        for instance in record["annotations"]:
            if instance["category_id"] not in contiguous:
                raise InputError(
                    f"{metadata.json_file}: an instance of image {record['image_id']} has category_id "
                    f"{instance['category_id']}, which is not a thing of {metadata.panoptic_json}"
                )
            instance["category_id"] = contiguous[instance["category_id"]]
        instances[record["image_id"]] = record["annotations"]
    return instances


def register_ade20k_panoptic(root: str | os.PathLike | None = None) -> None:
    """
    Register ``ade20k_panoptic_train`` and ``ade20k_panoptic_val``, unless Mask2Former has. Its scripts make the files.
    There are no instances: things are not the first of the 150 classes, as `COCOEvaluator` asks for.

    Args:
        root: the folder that holds ``ADEChallengeData2016``; None: ``$DETECTRON2_DATASETS``, or ``datasets``.
    """
    root = os.getenv("DETECTRON2_DATASETS", "datasets") if root is None else root
    folder = os.path.join(os.path.expanduser(os.fspath(root)), "ADEChallengeData2016")
    for split, images in (("train", "training"), ("val", "validation")):
        name = f"ade20k_panoptic_{split}"
        if name not in DatasetCatalog.list():
            register_panoptic(
                name,
                image_root=os.path.join(folder, "images", images),
                panoptic_json=os.path.join(folder, f"{name}.json"),
                panoptic_root=os.path.join(folder, name),
                sem_seg_root=os.path.join(folder, "annotations_detectron2", images),
            )
