"""Corrected copies of files, which Detectron2's ``PathManager`` gives in place of the originals."""

import atexit
import json
import os
import shutil
import tempfile
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler


class _SubstituteHandler(PathHandler):
    """Resolves one path to a copy of its file. Other paths with that prefix are unchanged."""

    def __init__(self, path: str, original: str):
        self.path, self.original = path, original
        self.copy: str | None = None

    def _get_supported_prefixes(self) -> list[str]:
        return [self.path]

    def _real(self, path: str | os.PathLike) -> str:
        path = os.fspath(path)
        return self.copy if path == self.path and self.copy else path

    def _get_local_path(self, path: str, force: bool = False, **options: Any) -> str:
        return self._real(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **options: Any):
        return open(self._real(path) if "r" in mode and "+" not in mode else path, mode, buffering)

    def _exists(self, path: str, **options: Any) -> bool:
        return os.path.exists(self._real(path))

    def _isfile(self, path: str, **options: Any) -> bool:
        return os.path.isfile(self._real(path))

    def _isdir(self, path: str, **options: Any) -> bool:
        return os.path.isdir(path)


_handlers: dict[str, _SubstituteHandler] = {}
_folder: list[str] = []


def original(path: str | os.PathLike) -> str:
    """The local path of a file, whether or not it has a mended copy."""
    path = os.fspath(path)
    handler = _handlers.get(path)
    return PathManager.get_local_path(path) if handler is None else handler.original


def substitute_json(path: str | os.PathLike, local: str, content: Any | None) -> None:
    """
    Give a corrected copy in place of a JSON, until the process ends.

    Args:
        path: as others ask for it.
        local: where the original lies on this machine.
        content: of the copy; None: the original is read again.
    """
    path = os.fspath(path)
    handler = _handlers.get(path)
    if content is None:
        if handler is not None:
            handler.copy = None
        return
    with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".json", delete=False, encoding="utf-8") as file:
        file.write(json.dumps(content))  # many times faster than json.dump
    if handler is None:
        handler = _handlers[path] = _SubstituteHandler(path, local)
        PathManager.register_handler(handler)
    handler.copy = file.name


def folder() -> str:
    """A folder for what lives as long as the process."""
    if not _folder:
        _folder.append(tempfile.mkdtemp(prefix="hourglass-"))
        atexit.register(shutil.rmtree, _folder[0], ignore_errors=True)
    return _folder[0]
