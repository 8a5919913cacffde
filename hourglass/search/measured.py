"""The measurements of a search, in a file that later searches reuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hourglass.files import write_whole
from hourglass.search.latency import Latency
from hourglass.search.trace import Errors

SCHEMA = 1


class Result(NamedTuple):
    """
    A plan on some images, against fast attention alone on the same.

    Attributes:
        time: of the encoder in ms, the median.
        speed: how many times as fast as with fast attention alone.
        agreement: "segm.AP" and so on -> (samples,) in percent, see :mod:`hourglass.evaluation.agreement`.
        labelled: the same -> (samples,) share of the figure that is kept, or (1,) where its evaluator cannot be
            resampled; empty without labels.
    """

    time: float
    speed: float
    agreement: dict[str, np.ndarray]
    labelled: dict[str, np.ndarray]


class Measured:
    """
    Args:
        path: of ``search.json``. Its measurements are reused if they were made with the same settings.
        settings: what figures depend on, as plain values.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self._content: dict[str, Any] = {"schema": SCHEMA, "settings": settings, "results": {}}
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            content = None
        found = content.get("settings") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
        #: Whether the file had something to go on from.
        self.resumed = found == settings
        #: The settings in which a file that was there differs; it is replaced.
        self.differing = [key for key in settings if found.get(key) != settings[key]] if isinstance(found, dict) else []
        if self.resumed:
            self._content = content

    def errors(self, measure: Callable[[], Errors]) -> Errors:
        return Errors(*self._tables("errors", measure))

    def latency(self, measure: Callable[[], Latency]) -> Latency:
        return Latency(*self._tables("latency", measure))

    def result(self, images: str, plan: str) -> Result | None:
        """Of a plan on some images, by their names."""
        record = self._content["results"].get(images, {}).get(plan)
        if record is None:
            return None
        agreement, labelled = (
            {key: np.array(values) for key, values in record[name].items()} for name in ("agreement", "labelled")
        )
        return Result(record["time"], record["speed"], agreement, labelled)

    def add(self, images: str, results: dict[str, Result]) -> None:
        of_images = self._content["results"].setdefault(images, {})
        for plan, result in results.items():
            plain = result._asdict()
            for name in ("agreement", "labelled"):
                plain[name] = {key: [round(float(value), 6) for value in values] for key, values in plain[name].items()}
            of_images[plan] = plain
        self._write()

    def conclude(self, **conclusion: Any) -> None:
        """Record the result of the last search."""
        self._content["found"] = conclusion
        self._write()

    def _tables(self, name: str, measure: Callable[[], Any]) -> list[Any]:
        if name not in self._content:
            tables = [
                [[list(_listed(key)), value] for key, value in table.items()] if isinstance(table, dict) else table
                for table in measure()
            ]
            self._content[name] = json.loads(json.dumps(tables))
            self._write()
        return [
            {_key(key): value for key, value in table} if isinstance(table, list) else table
            for table in self._content[name]
        ]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self._content))


def _listed(key: Any) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def _key(key: list[Any]) -> Any:
    parts = tuple(tuple(part) if isinstance(part, list) else part for part in key)
    return parts if len(parts) > 1 else parts[0]
