"""Data loaders that report errors in the data in one line."""

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch.utils.data import SequentialSampler

from hourglass.checks import check_choice
from hourglass.data.annotations import open_instances
from hourglass.data.augmentation import EnlargeShortestEdge, RandomStain, StretchContrast
from hourglass.data.images import SCALINGS, Header, read_header, read_headers, reading
from hourglass.data.mapper import PanopticMapper
from hourglass.errors import InputError

# What reads images as `read_image` does.
KNOWN_CALLS = (DatasetMapper.__call__, PanopticMapper.__call__)
# What the files are that a record may name.
FILES = {"file_name": "images", "pan_seg_file_name": "panoptic PNGs", "sem_seg_file_name": "semantic PNGs"}


class ReadableMapper:
    """
    A dataset mapper that names the image that it cannot read, reads 16 bits, and gives no image that is too large.

    Args:
        mapper: dataset dictionary -> input dictionary.
        scaling: of images of 16 bits, see :func:`~hourglass.data.images.read_image`.
        square: side of the square in pixels that the model pads images to; 0: any size.
    """

    def __init__(self, mapper, scaling: str = "full", square: int = 0):
        self.mapper = mapper
        self.scaling = scaling
        self.square = square

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        path = record.get("file_name")
        try:
            with reading(self.scaling, labels=record.get("sem_seg_file_name")) as paths:
                inputs = self.mapper(record)
        except detection_utils.SizeMismatchError as error:
            raise InputError(" ".join(str(error).split())) from error
        except (OSError, SyntaxError) as error:  # Pillow raises either for bad files
            reason = str(error).split("\n")[0]
            raise InputError(f"image {path} cannot be read ({type(error).__name__}: {reason})") from error
        if path is not None and path not in paths and _is_local(path) and read_header(os.fspath(path)).deep:
            log_first_n(
                logging.WARNING,
                f"image {path} has 16 bits, and {type(self.mapper).__name__} reads it by itself: what Detectron2's "
                "read_image gives a mapper that has imported it by name is clipped at 255",
                name=__name__,
            )
        if self.square and inputs is not None and "image" in inputs:
            check_square(tuple(inputs["image"].shape[-2:]), self.square, path)
        return inputs


class _BatchMapper:
    """A mapper of the records of a batch."""

    def __init__(self, mapper: ReadableMapper):
        self.mapper = mapper

    def __call__(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.mapper(record) for record in records]


class Batches:
    """The batches of a loader that gives them as its elements, one at a time."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for (batch,) in self.loader:
            yield batch


def check_square(size: tuple[int, int], square: int, path: str | None) -> None:
    """Raise InputError for an image of ``size`` pixels, as the model is given it, that does not fit into its square."""
    if max(size) > square:
        # Detectron2's main branch would cut it, and 0.6 pad it to a multiple of the square.
        raise InputError(
            f"image {path} is {size[0]} x {size[1]} pixels for the model, whose model.backbone.square_pad is {square}: "
            "resize in the mapper's augmentations, or set model.backbone.square_pad=0 where the encoder takes any size"
        )


def build_loader(node: DictConfig, max_images: int | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """
    Build a data loader from the LazyCall of Detectron2's ``build_detection_train_loader`` or ``..._test_loader``, of
    checked data.

    Args:
        node: the call, with ``dataset`` and ``mapper``.
        max_images: only the first so many images; None: all.

    Returns:
        the loader, and the records that it reads.

    Raises:
        InputError: see :func:`load_records`.
    """
    records = load_records(node, max_images)
    return load_images(node, records), records


def load_records(
    node: DictConfig, max_images: int | None = None, square: int = 0, spread: bool = False
) -> list[dict[str, Any]]:
    """
    The records of the data set that ``node``, as in :func:`build_loader`, reads, checked: annotations whole, and of the
    images the headers.

    Args:
        node, max_images: as there.
        square: side of the square in pixels that the model pads images to; 0: any size.
        spread: ``max_images`` that are spread evenly over the data set, in place of the first ones.

    Raises:
        InputError: for a data set that is not registered or not there, is without an image, or has annotations or
            images that cannot be read as they are meant.
    """
    name = node.dataset.get("names", "")
    names = [name] if isinstance(name, str) else list(name)
    if name:
        _check_registered(names)
    for dataset_name in names:
        check_instances(dataset_name)
    try:
        records = instantiate(node.dataset)
    except InputError:
        raise
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:  # what Detectron2 raises for bad data
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"data set {name!r} cannot be loaded ({type(error).__name__}: {reason})") from error
    if not records:
        raise InputError(f"data set {name!r} has no image to run on")
    if max_images is not None:
        count = min(max_images, len(records))
        records = [records[i * len(records) // count] for i in range(count)] if spread else records[:count]
    for key, kind in FILES.items():
        paths = [record[key] for record in records if key in record]
        missing = [path for path in paths if not _exists(path)]
        if missing:
            problem = f"{len(missing)} of the {len(paths)} {kind} of data set {name!r}"
            raise InputError(f"{problem} are missing, such as {missing[0]} ({_describe_location(name)})")
    mapper = instantiate(node.mapper)
    _check_headers(records, name, mapper)
    if square:
        _check_squares(records, mapper, square)
    return records


def load_images(
    node: DictConfig,
    records: list[dict[str, Any]],
    scaling: str = "full",
    square: int = 0,
    batch_size: int = 1,
    shared: bool = True,
) -> Any:
    """
    The loader of ``node``, as in :func:`build_loader`, for these records alone; empty where there are none.

    Args:
        node, records: as :func:`load_records` takes and gives them.
        scaling, square: as for :class:`ReadableMapper`.
        batch_size: over 1, of a loader that gives images one by one: it gives batches of so many consecutive records,
            the same ones however many processes share them. The last one may have fewer.
        shared: whether the processes of a distributed job share the images; False: each gets all of them.

    Raises:
        InputError: for arguments that the loader does not take.
    """
    check_choice("dataloader.image_scaling", scaling, SCALINGS)
    if not records:  # Detectron2's samplers take at least one
        return []
    arguments = {str(key): instantiate(node[key]) for key in node if key not in ("_target_", "dataset", "mapper")}
    if not shared and comm.get_world_size() > 1:
        arguments["sampler"] = SequentialSampler(records)
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    mapper = ReadableMapper(instantiate(node.mapper), scaling, square)
    try:
        if batch_size > 1:
            # Detectron2 0.6's loader takes no batch size: a batch is one of its data set's elements.
            batches = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
            return Batches(target(dataset=batches, mapper=_BatchMapper(mapper), **arguments))
        return target(dataset=records, mapper=mapper, **arguments)
    except (AssertionError, TypeError) as error:  # an argument that it does not take
        reason = str(error).strip().split("\n")[0]
        name = node.dataset.get("names", "")
        raise InputError(f"the loader of data set {name!r} cannot be built ({reason})") from error


def check_instances(name: str):
    """
    The checked instances of a registered data set, an :class:`~hourglass.data.annotations.InstanceFile`.

    Returns:
        None where it names no file of COCO's format.
    """
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    path = getattr(metadata, "json_file", None)
    if not path or metadata.get("evaluator_type") == "lvis":  # which has a format of its own
        return None
    return open_instances(path)


def _check_headers(records: Sequence[dict[str, Any]], name: Any, mapper: Any) -> None:
    """The sizes of images and of PNGs against the records, and the images' types of values."""
    local = [record for record in records if "file_name" in record and _is_local(record["file_name"])]
    headers = dict(zip(map(id, local), read_headers([os.fspath(record["file_name"]) for record in local])))
    # Other mappers may read whatever they like.
    if isinstance(mapper, (DatasetMapper, PanopticMapper)) and type(mapper).__call__ in KNOWN_CALLS:
        unread = [record for record in local if headers[id(record)].problem]
        if unread:
            problem = f"{len(unread)} of the {len(records)} images of data set {name!r} cannot be read"
            raise InputError(f"{problem}, such as {unread[0]['file_name']}, which {headers[id(unread[0])].problem}")
    bad = []
    for record in local:
        size = record.get("height"), record.get("width")
        if None not in size and size != headers[id(record)].upright:
            bad.append((record, size, headers[id(record)]))
    if bad:
        record, size, header = bad[0]
        raise InputError(
            f"{len(bad)} of the {len(records)} images of data set {name!r} have another size than their annotation "
            f"says, such as image {record.get('image_id')!r}: {record['file_name']} is {_format_size(header.upright)} "
            f"pixels{_describe_orientation(header, size)}, annotated is {_format_size(size)} (height x width)"
        )
    for key, kind in FILES.items():
        if key == "file_name":
            continue
        owners = [record for record in local if key in record and _is_local(record[key])]
        for record, header in zip(owners, read_headers([os.fspath(owner[key]) for owner in owners])):
            expected = headers[id(record)].upright
            if header.stored != expected:
                raise InputError(
                    f"{kind[:-1]} {record[key]} is {_format_size(header.stored)} pixels, its image "
                    f"{record['file_name']} {_format_size(expected)} (height x width)"
                )
            if key == "pan_seg_file_name" and header.mode not in ("RGB", "RGBA"):
                raise InputError(
                    f"panoptic PNG {record[key]} is of Pillow's mode {header.mode!r}: it must be 8 bit RGB"
                )


def _describe_orientation(header: Header, annotated: tuple) -> str:
    if header.orientation == 1:
        return ""
    stored = ", as which it was annotated" if annotated == header.stored else ""
    return f" upright (its EXIF orientation {header.orientation} turns {_format_size(header.stored)}{stored})"


def _format_size(size: Sequence) -> str:
    return f"{size[0]} x {size[1]}"


def _check_squares(records: Sequence[dict[str, Any]], mapper: Any, square: int) -> None:
    """What a mapper for tests makes of the sizes, where that is known unread; `ReadableMapper` sees the rest."""
    augmentations = getattr(getattr(mapper, "augmentations", None), "augs", None)
    if augmentations is None or getattr(mapper, "is_train", True):
        return
    state = np.random.get_state()
    sizes: dict = {}
    for record in records:
        height, width = size = record.get("height"), record.get("width")
        if height is None or width is None:
            continue
        if size not in sizes:
            sizes[size] = _size_after(augmentations, height, width)
        if sizes[size] is not None:
            check_square(sizes[size], square, record.get("file_name"))
    np.random.set_state(state)


def _size_after(augmentations: Iterable[Any], height: int, width: int) -> tuple[int, int] | None:
    for augmentation in augmentations:
        if isinstance(augmentation, (StretchContrast, RandomStain)):
            continue
        if not isinstance(augmentation, (T.ResizeShortestEdge, T.Resize, EnlargeShortestEdge)):
            return None
        # Takes no memory.
        transform = augmentation.get_transform(np.broadcast_to(np.uint8(0), (height, width, 3)))
        if isinstance(transform, T.ResizeTransform):
            height, width = transform.new_h, transform.new_w
    return height, width


def _check_registered(names: list[str]) -> None:
    for name in names:
        if name not in DatasetCatalog.list():
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "a config file can register it"
            raise InputError(f"data set {name!r} is not registered with Detectron2: {hint}")
        metadata = MetadataCatalog.get(name)
        parts = ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root")
        expected = [os.fspath(path) for part in parts if (path := getattr(metadata, part, None))]
        for path in expected:
            if not _exists(path):
                problem = f"{path} is missing; {' and '.join(expected)} are expected"
                raise InputError(f"data set {name!r} is not there: {problem} ({_describe_location(name)})")


def _exists(path: str | os.PathLike) -> bool:
    return not _is_local(path) or os.path.exists(path)


def _is_local(path: str | os.PathLike) -> bool:
    return "://" not in os.fspath(path)


def _describe_location(name: str | list[str]) -> str:
    """What says where the data set is; its metadata may name an environment variable of its own for that."""
    first = name if isinstance(name, str) else name[0]
    variable = MetadataCatalog.get(first).get("variable") if first else None
    if variable and os.environ.get(variable):
        return f"{variable} is {os.environ[variable]!r}"
    unset = f"{variable} is not set, and " if variable else ""
    root = os.environ.get("DETECTRON2_DATASETS")
    if root:
        return f"{unset}DETECTRON2_DATASETS is {root!r}"
    return f"{unset}DETECTRON2_DATASETS is not set, so 'datasets' is read"
