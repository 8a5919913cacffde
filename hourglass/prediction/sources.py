"""The images and videos that paths lead to, and their pixels."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from hourglass.data.images import read_image
from hourglass.data.unlabelled import SUFFIXES
from hourglass.errors import InputError, reason
from hourglass.files import printable

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


class Source(NamedTuple):
    """
    A file to predict on.

    Attributes:
        path: of the file; it need not be there.
        name: that what is drawn of it gets, without a suffix: its path below the folder that was given.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(paths: Sequence[str]) -> list[Source]:
    """
    Args:
        paths: of files, whatever they are called, and of folders, of which images and videos are taken by their names
            and the folders in them too.

    Returns:
        the files in the order of the paths, those of a folder by their names; each with a name of its own.
    """
    sources: list[Source] = []
    names: set[str] = set()
    for argument in paths:
        path = Path(os.path.expanduser(argument))  # as it is where there is no such user
        files = [path]
        if path.is_dir():
            suffixes = (*SUFFIXES, *VIDEO_SUFFIXES)
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        for file in files:
            plain = str((file.relative_to(path) if file != path else Path(file.name)).with_suffix(""))
            name, number = plain, 1
            while name in names:
                number += 1
                name = f"{plain}_{number}"
            names.add(name)
            sources.append(Source(file, name))
    return sources


def read_pixels(path: Path, scaling: str) -> np.ndarray:
    """
    Args:
        path: of an image.
        scaling: of 16 bits, see :func:`~hourglass.data.images.read_image`.

    Returns:
        (H, W, 3) uint8 in BGR.

    Raises:
        InputError: for what is no image, truncated or not there.
    """
    try:
        return read_image(os.fspath(path), "BGR", scaling)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except Exception as error:  # whatever a decoder raises for a bad file
        raise InputError(f"{path} cannot be read as an image ({reason(error)})") from error


class Video:
    """
    The frames of a video, one after another.

    Args:
        path: of the file.

    Attributes:
        rate: of the video, in frames a second; 25 where it does not say.
        length: how many frames it says that it has; None where it does not say.

    Raises:
        InputError: for what OpenCV cannot read as a video.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise InputError(f"{path} is missing")
        _check_name(path)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what it would say is said in a line
        self._capture = cv2.VideoCapture(os.fspath(path))
        if not self._capture.isOpened():
            raise InputError(f"{path} cannot be read as a video")
        rate, length = (self._capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else 25.0
        self.length = int(length) if math.isfinite(length) and length >= 1 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 in BGR, until the end or what cannot be decoded."""
        while True:
            ok, frame = self._capture.read()
            if not ok:
                return
            yield frame

    def close(self) -> None:
        self._capture.release()


class VideoFile:
    """
    A video that is written frame by frame, and is there when it is closed.

    Args:
        path: of the file, an MP4.
        rate: in frames a second.
    """

    def __init__(self, path: Path, rate: float):
        self._path = path
        # Of as many decimals as MPEG-4 takes, whose frames begin at multiples of 1 / 65535 s at the finest.
        self._rate = round(rate, next(digits for digits in (3, 2, 1, 0) if rate * 10**digits < 65535))
        self._part = path.with_name(f".{path.stem}.part{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def add(self, frame: np.ndarray) -> None:
        """``frame``: (H, W, 3) uint8 in BGR; resized to the first one's size where it has another."""
        if self._writer is None:
            _check_name(self._path)
            self._part.parent.mkdir(parents=True, exist_ok=True)
            # The format takes even sides alone.
            self._size = (frame.shape[1] // 2 * 2, frame.shape[0] // 2 * 2)
            self._writer = cv2.VideoWriter(
                os.fspath(self._part), cv2.VideoWriter.fourcc(*"mp4v"), self._rate, self._size
            )
            if not self._writer.isOpened():
                raise InputError(f"{self._path} cannot be written: this OpenCV has no encoder of MP4 videos")
        columns, rows = self._size
        if frame.shape[0] - rows in (0, 1) and frame.shape[1] - columns in (0, 1):
            frame = frame[:rows, :columns]
        else:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(np.ascontiguousarray(frame))

    def close(self, complete: bool = True) -> None:
        """Finish the file; unless ``complete``, remove it."""
        if self._writer is None:
            return
        self._writer.release()
        if complete:
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)


def _check_name(path: Path) -> None:
    """Raise InputError for a path that OpenCV's videos do not take: it ends the process."""
    name = os.fspath(path)
    if printable(name) != name:
        raise InputError(f"the path of a video must be UTF-8, got {printable(name)!r}: rename it")
