"""Reading images of 8 and 16 bits as 8 bits, and their headers."""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import IO, NamedTuple, cast

import cv2
import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image
from PIL.ImageFile import ImageFile

from hourglass.checks import check_choice
from hourglass.data.augmentation import StretchContrast
from hourglass.errors import InputError

#: How values of 16 bits become 8: their full range, or the range between the percentiles of `StretchContrast`.
SCALINGS = ("full", "percentiles")

# Pillow's names. Its 32 bit integers are 16 bits where the format has no more.
EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}
SIXTEEN_BIT_FORMATS = {"PNG", "PPM"}
# Of colours Pillow keeps 8 bits; that there are 16 only its decoder's arguments say.
SIXTEEN_BIT_COLOURS = re.compile(r"(RGB|RGBA|RGBa|RGBX+|LA|R|G|B|A);16[BLN]")
ORIENTATION = 274  # EXIF

_reading: ContextVar["_Reading | None"] = ContextVar("reading", default=None)


class Header(NamedTuple):
    """
    The header of an image file.

    Attributes:
        stored: (height, width) in the file.
        upright: (height, width) as it is read, with the EXIF orientation applied.
        orientation: EXIF's, 1 where the file has none.
        mode: Pillow's.
        deep: whether values have 16 bits.
        problem: why it cannot be read; empty where it can.
    """

    stored: tuple[int, int]
    upright: tuple[int, int]
    orientation: int
    mode: str
    deep: bool
    problem: str


def read_image(path: str, format: str | None = None, scaling: str | None = None) -> np.ndarray:
    """
    Detectron2's ``read_image`` (EXIF orientation applied), which clips values of 16 bits, with these scaled to 8.

    Args:
        path: of the image.
        format: "RGB", "BGR", "YUV-BT.601" or one of Pillow's modes; None: as it is in the file.
        scaling: of `SCALINGS`: "full" takes 65535 to 255, so that an image that is 257 times an 8-bit one gives the
            same pixels; "percentiles" stretches each image's own range, for cameras that use a part of the 16 bits.
            None: as :func:`reading` says, "full" outside of it.

    Returns:
        (H, W, channels) uint8, (H, W) where `format` is None and the image grey; float for "YUV-BT.601".

    Raises:
        InputError: for values of other types, such as floats.
    """
    if scaling is None:
        reading = _reading.get()
        scaling = "full" if reading is None else reading.scaling
    check_choice("scaling", scaling, SCALINGS)
    with PathManager.open(path, "rb") as file:
        image: Image.Image = Image.open(file)
        if problem := _problem(image):
            raise InputError(f"image {path} {problem}")
        if _is_deep(image):
            values = _sixteen_bits(image, path)
            file.seek(0)
            exif = Image.open(file).getexif()
            image = Image.fromarray(_to_8_bits(values, scaling, path))
            image.getexif().update(exif)
        image = detection_utils._apply_exif_orientation(image)
        return detection_utils.convert_PIL_to_numpy(image, format)


def read_header(path: str) -> Header:
    """
    What a file says of itself, its pixels unread. An orientation that a PNG has after its pixels is not seen.

    Raises:
        InputError: for a file that cannot be read.
    """
    status = os.stat(path)
    return _read_header(path, status.st_mtime_ns, status.st_size)


def read_headers(paths: list[str]) -> list[Header]:
    """:func:`read_header` of many files, in threads: a network's latency is waited for once."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read_header, paths))


@functools.lru_cache(maxsize=250_000)  # training evaluates the same images again and again
def _read_header(path: str, modified: int, size: int) -> Header:
    try:
        with Image.open(path) as image:
            width, height = image.size
            # A PNG without one before the pixels would be decoded in search of one after them.
            has_exif = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(ORIENTATION, 1) if has_exif else 1
            mode, deep, problem = image.mode, _is_deep(image), _problem(image)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises any of these for bad files
        reason = str(error).split("\n")[0]
        raise InputError(f"image {path} cannot be read ({type(error).__name__}: {reason})") from error
    upright = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    return Header((height, width), upright, orientation, mode, deep, problem)


@contextlib.contextmanager
def reading(scaling: str, labels: str | None = None) -> Iterator[list[str]]:
    """
    Within it, dataset mappers that read through Detectron2's ``detection_utils`` read as :func:`read_image` does.

    Args:
        scaling: of `SCALINGS`.
        labels: a file of class ids, whose values are read as they are.

    Yields:
        the paths that were read so, a list that grows.
    """
    if detection_utils.read_image is _DETECTRON2_READ_IMAGE:  # not somebody else's in its place
        detection_utils.read_image = _read_for_mapper
    state = _Reading(scaling, labels, [])
    token = _reading.set(state)
    try:
        yield state.paths
    finally:
        _reading.reset(token)


class _Reading(NamedTuple):
    scaling: str
    labels: str | None
    paths: list[str]


_DETECTRON2_READ_IMAGE = detection_utils.read_image


def _read_for_mapper(file_name: str, format: str | None = None) -> np.ndarray:
    """In the place of Detectron2's function, which it calls for everybody else."""
    state = _reading.get()
    if state is None:
        return _DETECTRON2_READ_IMAGE(file_name, format)
    state.paths.append(file_name)
    if file_name == state.labels:
        return read_labels(file_name)
    return read_image(file_name, format)


def read_labels(path: str) -> np.ndarray:
    """
    Class ids of a semantic PNG, which is not converted: a palette's indices and values of 16 bits stay what they are.

    Returns:
        (H, W, 1) uint8.

    Raises:
        InputError: for an image of colours, or ids over 255.
    """
    with PathManager.open(path, "rb") as file:
        image = Image.open(file)
        if image.mode not in {"1", "L", "P", "I", *SIXTEEN_BITS}:
            raise InputError(
                f"semantic PNG {path} is of Pillow's mode {image.mode!r}: it must have one channel of class ids"
            )
        labels = np.asarray(image)
    if labels.max(initial=0) > 255 or labels.min(initial=0) < 0:
        raise InputError(f"semantic PNG {path} has the class id {labels.max()}: ids must be from 0 to 255")
    return labels.astype(np.uint8)[..., None]


def _problem(image: Image.Image) -> str:
    if image.format == "TIFF" and image.getexif().get(ORIENTATION, 1) != 1:
        # Releases of Pillow differ in whether reading applies it.
        return "is a TIFF with an orientation: it must be upright"
    if image.mode in EIGHT_BITS or _is_deep(image):
        return ""
    return f"is of Pillow's mode {image.mode!r} ({image.format}): values must be of 8 or 16 bits without sign"


def _is_deep(image: Image.Image) -> bool:
    if image.mode == "I":
        return image.format in SIXTEEN_BIT_FORMATS
    return image.mode in SIXTEEN_BITS or _has_deep_colours(image)


def _has_deep_colours(image: Image.Image) -> bool:
    for *_, arguments in getattr(image, "tile", ()):
        raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        if isinstance(raw, str) and SIXTEEN_BIT_COLOURS.fullmatch(raw):
            return True
    return False


def _sixteen_bits(image: Image.Image, path: str) -> np.ndarray:
    """(H, W) or (H, W, 3) uint16 in RGB."""
    if not _has_deep_colours(image):
        return np.asarray(image).astype(np.uint16)
    file = cast(IO[bytes], cast(ImageFile, image).fp)  # nothing else has deep colours
    file.seek(0)
    pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise InputError(f"image {path} has colours of 16 bits that OpenCV cannot read: it must be PNG or TIFF")
    return pixels if pixels.ndim == 2 else pixels[..., 2::-1]


def _to_8_bits(values: np.ndarray, scaling: str, path: str) -> np.ndarray:
    if scaling == "percentiles":
        stretched = StretchContrast().get_transform(values).apply_image(values)
        if stretched.dtype == np.uint8:  # it leaves an image of one value as it is
            return stretched
    elif values.size and 0 < values.max() < 4096:
        log_first_n(
            logging.WARNING,
            f"the brightest value of image {path} is {values.max()} of 65535, so that little is left of it in 8 bits: "
            "dataloader.image_scaling=percentiles stretches each image's own range",
            name=__name__,
        )
    return np.round(values / 257).astype(np.uint8)
