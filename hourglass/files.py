"""Files that are written whole, and folders that can be written to."""

import os
import tempfile
from pathlib import Path

from hourglass.errors import InputError


def check_folder(name: str, folder: str | os.PathLike) -> None:
    """Raise InputError if ``folder``, which the option ``name`` gives, can neither be written to nor made."""
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name} takes a folder that can be written to, got {str(folder)!r}")


def write_whole(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_text(text)
        os.replace(whole, path)
