"""Files that are written whole, and folders that can be written to."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hourglass.errors import InputError


def check_folder(name: str, folder: str | os.PathLike) -> None:
    """Raise InputError if ``folder``, which the option ``name`` gives, can neither be written to nor made."""
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name} must be a folder that can be written to, got {str(folder)!r}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the file atomically: after an error the old file, if any, is unchanged."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)


def save_whole(path: Path, content: Any) -> None:
    """``torch.save``, atomically, see :func:`write_whole`."""
    file = io.BytesIO()
    torch.save(content, file)
    write_whole(path, file.getvalue())


def write_together(folder: str | os.PathLike, texts: dict[str, str]) -> None:
    """
    Write several files into a folder, which is made where it is missing: all of them whole, or none.

    Args:
        folder: of the files. Where one cannot be written, those that were there before are there again.
        texts: name -> content.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = {name: (folder / name).read_bytes() for name in texts if (folder / name).exists()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, text in texts.items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        written = []
        try:
            for name in texts:
                os.replace(Path(scratch) / name, folder / name)
                written.append(name)
        except OSError:
            for name in written:
                if name in before:
                    (folder / name).write_bytes(before[name])
                else:
                    (folder / name).unlink()
            raise


def printable(text: str) -> str:
    """A path, or a text with one, that can be printed: what is no UTF-8 in the name of a file becomes "?"."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def write_whole_folder(path: Path) -> Iterator[Path]:
    """
    A folder to write into, which takes the place of the one at ``path`` at the end: whole or, after an error, not at
    all.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        new, old = Path(scratch) / path.name, Path(scratch) / "old"
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
