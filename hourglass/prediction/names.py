"""The names and ids of a model's classes, from the metadata of its data set."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from detectron2.data import Metadata

from hourglass.errors import InputError, reason


class Names(NamedTuple):
    """
    Names and ids of classes, by the model's class number, from 0.

    Attributes:
        things, stuff: the names.
        thing_ids, stuff_ids: the categories' ids in the data set.
    """

    things: Mapping[int, str]
    stuff: Mapping[int, str]
    thing_ids: Mapping[int, int]
    stuff_ids: Mapping[int, int]

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> "Names":
        """From Detectron2's metadata, or from the data set's JSON where that has not been read yet."""
        things, stuff = (_known(metadata, f"{kind}_classes") or [] for kind in ("thing", "stuff"))
        ids = {kind: _known(metadata, f"{kind}_dataset_id_to_contiguous_id") or {} for kind in ("thing", "stuff")}
        unknown = not things and not stuff
        # Names may be registered without ids; LVIS's count from 1, and its files are large.
        if unknown or things and not ids["thing"] and _known(metadata, "evaluator_type") != "lvis":
            path = _known(metadata, "json_file")
            if isinstance(path, str | os.PathLike) and os.path.isfile(path):
                categories = _read_categories(path)
                if unknown or list(things) == list(categories.values()):
                    things = list(categories.values())
                    ids["thing"] = {id: i for i, id in enumerate(categories)}
        return cls(
            dict(enumerate(things)),
            dict(enumerate(stuff)),
            {number: id for id, number in ids["thing"].items()},
            {number: id for id, number in ids["stuff"].items()},
        )

    @property
    def known(self) -> bool:
        return bool(self.things or self.stuff)

    def name(self, number: int, thing: bool = True) -> str:
        """The name of a class, or "class N" where it has none."""
        return (self.things if thing else self.stuff).get(number, f"class {number}")

    def category_id(self, number: int, thing: bool = True) -> int:
        """The data set's id; where it is not known, that of categories that are counted from 1."""
        return (self.thing_ids if thing else self.stuff_ids).get(number, number + 1)

    def categories(self) -> list[dict[str, Any]]:
        """As COCO's JSONs list them."""
        categories = {}
        for thing, names in ((False, self.stuff), (True, self.things)):
            for number, name in names.items():
                id = self.category_id(number, thing)
                # Panoptic data sets may count their things among the stuff too.
                categories[id] = {"id": id, "name": name, "isthing": int(thing)}
        return [categories[id] for id in sorted(categories)]


def _read_categories(path: str | os.PathLike) -> dict[int, str]:
    """The names by id, in the order of the ids."""
    try:
        with open(path, encoding="utf-8") as file:
            categories = json.load(file).get("categories", [])
        return {category["id"]: category["name"] for category in sorted(categories, key=lambda entry: entry["id"])}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # of a file that is no such JSON
        raise InputError(f"instances JSON {path} has no categories that can be read ({reason(error)})") from error


def _known(metadata: Metadata, key: str) -> Any:
    try:
        return metadata.get(key)
    except (InputError, OSError):  # it is read from the data set, which is not there
        return None
