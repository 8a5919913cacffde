"""Instances in COCO's format: everything that loaders and evaluators read is checked, and corrected where safe."""

import functools
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from detectron2.utils import comm
from pycocotools import mask as rle

from hourglass.checks import repeated
from hourglass.data.mending import original, substitute_json
from hourglass.errors import InputError

logger = logging.getLogger(__name__)

# How many annotations are checked at once: bounds the memory.
BLOCK = 10_000
# Pixels by which a box may differ from that of its mask, or leave its image.
TOLERANCE = 2.0


class Missing(NamedTuple):
    """
    Annotations that lack something.

    Attributes:
        number: how many.
        first: the id of the first, None where there is none.
    """

    number: int
    first: Any


class InstanceFile(NamedTuple):
    """
    What a checked file holds.

    Attributes:
        path: its name in messages.
        image_ids: of its images.
        categories: how many.
        annotations: how many.
        without_mask: those without a mask.
        without_keypoints: those without keypoints.
    """

    path: str
    image_ids: frozenset
    categories: int
    annotations: int
    without_mask: Missing
    without_keypoints: Missing


def open_instances(path: str | os.PathLike, name: str | None = None) -> InstanceFile:
    """
    Check a JSON of instances. Defects with an unambiguous correction are corrected with a warning: Detectron2's
    ``PathManager`` then gives a corrected copy of the file. Changes of the file since the last call are detected.

    Corrected are: a missing ``iscrowd`` (0), ``area`` (the mask's, else the box's) and ``bbox`` (the mask's); a polygon
    that is not in a list; polygons under 3 points beside others; ids of annotations that are not whole numbers over 0,
    which pycocotools counts wrongly.

    Args:
        path: of the JSON, remote or not.
        name: of the file in messages; None: `path`.

    Raises:
        InputError: for any other violation of COCO's format; the message names the first one.
    """
    name = os.fspath(path) if name is None else name
    try:
        local = original(path)
        status = os.stat(local)
    except OSError as error:
        raise InputError(f"instances JSON {name} cannot be read ({type(error).__name__})") from error
    return _open_instances(os.fspath(path), local, name, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _open_instances(path: str, local: str, name: str, modified: int, size: int) -> InstanceFile:
    try:
        with open(local, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"instances JSON {name} cannot be read ({type(error).__name__}: {reason})") from error
    check = InstanceCheck(content, name)
    checked = check.run()
    substitute_json(path, local, content if check.mends else None)
    if comm.is_main_process():
        for line in [*check.mends, *check.doubts]:
            logger.warning(line)
    return checked


class InstanceCheck:
    """
    Checks the content of a JSON and corrects it in place.

    Attributes:
        mends: after :meth:`run`, a line for each kind of correction.
        doubts: a line for everything that is suspicious but not certainly wrong.

    Args:
        content: as ``json.load`` gives it.
        name: of the file in messages.
    """

    def __init__(self, content: Any, name: str):
        self.content, self.name = content, name
        self._mends: dict[tuple[str, str], tuple[int, str]] = {}
        self.doubts: list[str] = []
        self._images: dict[Any, tuple[int, int]] = {}
        self._categories: set[int] = set()
        self._left = self._boxes = 0  # boxes that leave their images, and all
        self._corners = self._compared = 0  # boxes that are x0 y0 x1 y1 by their masks, and those with masks
        self._first_corners: Any = None

    @property
    def mends(self) -> list[str]:
        total = len(self.content["annotations"])
        return [
            f"instances JSON {self.name}: {count} of the {total} {problem}, such as {first}: {remedy}"
            for (problem, remedy), (count, first) in self._mends.items()
        ]

    def run(self) -> InstanceFile:
        """
        Raises:
            InputError: for what is not COCO's format.
        """
        for key in ("images", "annotations", "categories"):
            if not isinstance(self.content, dict) or not isinstance(self.content.get(key), list):
                content = sorted(self.content) if isinstance(self.content, dict) else type(self.content).__name__
                raise InputError(
                    f"instances JSON {self.name} has no list {key!r}, it has {content}: it must be in COCO's format"
                )
        self._check_categories(self.content["categories"])
        self._check_images(self.content["images"])
        annotations = self.content["annotations"]
        self._check_links(annotations)
        self._check_flags(annotations)
        self._require(
            "whose area is not a number of at least 0",
            annotations,
            [_is_area(annotation.get("area")) for annotation in annotations],
            "area",
        )
        self._unwrap_polygons(annotations)
        for start in range(0, len(annotations), BLOCK):
            self._check_shapes(annotations[start : start + BLOCK])
        self._check_totals()
        return InstanceFile(
            path=self.name,
            image_ids=frozenset(self._images),
            categories=len(self._categories),
            annotations=len(annotations),
            without_mask=_missing(annotation for annotation in annotations if "segmentation" not in annotation),
            without_keypoints=_missing(annotation for annotation in annotations if not annotation.get("keypoints")),
        )

    # --- images and categories --------------------------------------------------------------------------------------

    def _check_categories(self, categories: list) -> None:
        if not categories:
            raise InputError(f"instances JSON {self.name} has no category")
        for i, category in enumerate(categories):
            if not isinstance(category, dict) or not isinstance(category.get("name"), str):
                raise InputError(f"instances JSON {self.name}: category {i} of its list has no name, got {category!r}")
        bad = [category.get("id") for category in categories if not _is_whole(category.get("id"))]
        if bad:
            raise InputError(
                f"instances JSON {self.name}: {len(bad)} of the {len(categories)} categories have ids that are not "
                f"whole numbers, such as {bad[0]!r}"
            )
        self._categories = self._unique("category", [category["id"] for category in categories])

    def _check_images(self, images: list) -> None:
        for i, image in enumerate(images):
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
                raise InputError(f"instances JSON {self.name}: image {i} of its list has no file_name, got {image!r}")
        ids = [image.get("id") for image in images]
        # pycocotools sorts them: numbers and text together would become text.
        names = bool(ids) and isinstance(ids[0], str)
        bad = [(image, id) for image, id in zip(images, ids) if not (isinstance(id, str) if names else _is_whole(id))]
        if bad:
            (image, id), kind = bad[0], "text, as the first is" if names else "whole numbers"
            raise InputError(
                f"instances JSON {self.name}: {len(bad)} of the {len(images)} images have ids that are not {kind}, "
                f"such as {id!r} of {image['file_name']}"
            )
        self._unique("image", ids)
        for image in images:
            size = image.get("height"), image.get("width")
            if not all(_is_whole(side) and side > 0 for side in size):
                raise InputError(
                    f"instances JSON {self.name}: image {image['id']!r} has height {size[0]!r} and width {size[1]!r}: "
                    "both must be whole numbers over 0"
                )
            self._images[image["id"]] = size

    def _unique(self, kind: str, ids: list) -> set:
        twice = repeated(ids)
        if twice:
            raise InputError(
                f"instances JSON {self.name}: {len(twice)} {kind} ids occur more than once, such as {twice[0]!r}"
            )
        return set(ids)

    # --- ids and flags of annotations -------------------------------------------------------------------------------

    def _check_links(self, annotations: list) -> None:
        """The ids that an annotation has and refers to."""
        for i, annotation in enumerate(annotations):
            if not isinstance(annotation, dict):
                raise InputError(
                    f"instances JSON {self.name}: annotation {i} of its list is not an object, got {annotation!r}"
                )
        valid = [
            isinstance(annotation.get("image_id"), str) or _is_whole(annotation.get("image_id"))
            for annotation in annotations
        ]
        self._require("whose image_id is neither a whole number nor text", annotations, valid)
        strange = [annotation for annotation in annotations if annotation["image_id"] not in self._images]
        if strange:
            first = strange[0]
            line = (
                f"instances JSON {self.name}: {len(strange)} of the {len(annotations)} annotations have an image_id "
                f"that none of its images has, such as annotation {first.get('id')!r} with {first['image_id']!r}"
            )
            texts = {str(id) for id in self._images}
            if len(strange) == len(annotations) or any(str(annotation["image_id"]) in texts for annotation in strange):
                raise InputError(f"{line} (its images have ids such as {next(iter(self._images), None)!r})")
            self.doubts.append(f"{line}: they are left out")
        valid = [_is_whole(annotation.get("category_id")) for annotation in annotations]
        self._require("whose category_id is not a whole number", annotations, valid, "category_id")
        valid = [annotation["category_id"] in self._categories for annotation in annotations]
        self._require(
            f"whose category_id is none of {sorted(self._categories)[:20]}", annotations, valid, "category_id"
        )

        ids = [annotation.get("id") for annotation in annotations]
        if "minival" not in self.name:  # COCO 2014's have a few twice, which Detectron2 lets pass
            self._unique("annotation", [id for id in ids if id is not None and not isinstance(id, (list, dict))])
        # A found object is noted by its id: 0 would count as not found, and text cannot be noted.
        bad = [id for id in ids if not _is_whole(id) or id < 1]
        if bad:
            for i, annotation in enumerate(annotations, start=1):
                annotation["id"] = i
            self._record_mend(
                len(bad), "annotations have ids that are not whole numbers over 0", repr(bad[0]), "all are renumbered"
            )

    def _check_flags(self, annotations: list) -> None:
        missing = [annotation for annotation in annotations if annotation.get("iscrowd") is None]
        for annotation in missing:
            annotation["iscrowd"] = 0
        if missing:
            self._record_mend(len(missing), "annotations have no iscrowd", _describe(missing[0]), "0 is assumed")
        valid = [annotation["iscrowd"] in (0, 1) for annotation in annotations]
        self._require("whose iscrowd is neither 0 nor 1", annotations, valid, "iscrowd")
        valid = [annotation.get("ignore", 0) in (0, None, False) for annotation in annotations]
        self._require('with "ignore", which Detectron2 does not take (crowds are ignored)', annotations, valid)

    # --- masks and boxes --------------------------------------------------------------------------------------------

    def _unwrap_polygons(self, annotations: list) -> None:
        flat, short, useless, bad = [], [], [], []
        for annotation in annotations:
            mask = annotation.get("segmentation")
            if not mask:  # missing, null, [], {}
                annotation.pop("segmentation", None)
                continue
            if isinstance(mask, list) and len(mask) >= 6 and all(_is_number(number) for number in mask):
                flat.append(annotation)
                mask = annotation["segmentation"] = [mask]
            if isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
                if any(len(polygon) % 2 for polygon in mask):
                    bad.append(annotation)
                    continue
                complete = [polygon for polygon in mask if len(polygon) >= 6]
                if not complete:
                    # Detectron2's loader would drop the object with its box.
                    useless.append(annotation)
                    del annotation["segmentation"]
                elif len(complete) < len(mask):
                    short.append(annotation)
                    annotation["segmentation"] = complete
            elif not isinstance(mask, dict):
                bad.append(annotation)
        if bad:
            self._raise(
                bad, len(annotations), "whose segmentation is neither RLE nor a list of polygons [x0, y0, x1, y1, ...]"
            )
        if flat:
            self._record_mend(
                len(flat),
                "annotations have a polygon that is not in a list",
                _describe(flat[0]),
                "it is put into a list",
            )
        if short:
            self._record_mend(
                len(short),
                "annotations have polygons of under 3 points beside others",
                _describe(short[0]),
                "those are left out",
            )
        if useless:
            self._record_mend(
                len(useless),
                "annotations have polygons of under 3 points alone",
                _describe(useless[0]),
                "they count as without a mask",
            )

    def _check_shapes(self, annotations: list) -> None:
        total = len(self.content["annotations"])
        polygons = [annotation for annotation in annotations if isinstance(annotation.get("segmentation"), list)]
        runs = [annotation for annotation in annotations if isinstance(annotation.get("segmentation"), dict)]
        extents = {**self._polygon_extents(polygons, total), **self._run_extents(runs, total)}

        missing = [annotation for annotation in annotations if not annotation.get("bbox")]
        nowhere = [annotation for annotation in missing if id(annotation) not in extents]
        if nowhere:
            self._raise(nowhere, total, "without a bbox and a mask")
        for annotation in missing:
            x0, y0, x1, y1 = extents[id(annotation)]
            annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if missing:
            self._record_mend(len(missing), "annotations have no bbox", _describe(missing[0]), "their masks' is used")
        bad = [annotation for annotation in annotations if not _is_box(annotation["bbox"])]
        if bad:
            self._raise(
                bad,
                total,
                "whose bbox is not [x, y, width, height] of finite numbers, none of the sides under 0",
                "bbox",
            )
        self._check_boxes(annotations, extents)

        unknown = [annotation for annotation in annotations if annotation.get("area") is None]
        for annotation in unknown:
            annotation["area"] = self._area(annotation)
        if unknown:
            self._record_mend(
                len(unknown), "annotations have no area", _describe(unknown[0]), "their masks' or else boxes' is used"
            )

    def _polygon_extents(self, annotations: list, total: int) -> dict[int, tuple[float, float, float, float]]:
        """Of each annotation, by identity: x0, y0, x1, y1."""
        if not annotations:
            return {}
        owners = [annotation for annotation in annotations for _ in annotation["segmentation"]]
        polygons = [polygon for annotation in annotations for polygon in annotation["segmentation"]]
        try:
            values = np.array(list(chain.from_iterable(polygons)))
        except ValueError:  # lists of different lengths
            values = np.array([None])
        if values.ndim != 1 or values.dtype.kind not in "if" or not np.isfinite(values).all():
            bad = [
                annotation
                for annotation in annotations
                if not all(_is_number(x) for polygon in annotation["segmentation"] for x in polygon)
            ]
            self._raise(bad, total, "with polygons of other values than finite numbers")
        starts = np.cumsum([0, *(len(polygon) // 2 for polygon in polygons[:-1])])
        points = values.astype(np.float64).reshape(-1, 2)
        low = np.minimum.reduceat(points, starts)
        high = np.maximum.reduceat(points, starts)
        extents: dict[int, tuple[float, float, float, float]] = {}
        for annotation, (x0, y0), (x1, y1) in zip(owners, low.tolist(), high.tolist()):
            if id(annotation) in extents:
                a0, b0, a1, b1 = extents[id(annotation)]
                x0, y0, x1, y1 = min(x0, a0), min(y0, b0), max(x1, a1), max(y1, b1)
            extents[id(annotation)] = (x0, y0, x1, y1)
        return extents

    def _run_extents(self, annotations: list, total: int) -> dict[int, tuple[float, float, float, float]]:
        if not annotations:
            return {}
        bad = [annotation for annotation in annotations if not _is_rle(annotation["segmentation"])]
        if bad:
            self._raise(bad, total, 'whose RLE is not {"size": [height, width], "counts": text or whole numbers}')
        # Annotations of images that are not there have no size to be compared with.
        sized = [
            (annotation, self._images[annotation["image_id"]])
            for annotation in annotations
            if annotation["image_id"] in self._images
        ]
        turned = [
            annotation for annotation, size in sized if tuple(annotation["segmentation"]["size"]) == size[::-1] != size
        ]
        if turned:
            self._raise(turned, total, "whose RLE has the size (width, height), which must be (height, width)")
        mismatched = [annotation for annotation, size in sized if tuple(annotation["segmentation"]["size"]) != size]
        if mismatched:
            height, width = self._images[mismatched[0]["image_id"]]
            size = mismatched[0]["segmentation"]["size"]
            self._raise(
                mismatched, total, f"whose RLE has another size than their image ({size}, not [{height}, {width}])"
            )
        pixels = count_pixels([annotation["segmentation"] for annotation in annotations])
        short = [
            annotation
            for annotation, count in zip(annotations, pixels)
            if count != math.prod(annotation["segmentation"]["size"])
        ]
        if short:
            self._raise(short, total, "whose RLE does not count all pixels of its size")
        masks = [_compressed(annotation["segmentation"]) for annotation in annotations]
        boxes = np.asarray(rle.toBbox(masks)).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return {id(annotation): tuple(box) for annotation, box in zip(annotations, boxes.tolist())}

    def _check_boxes(self, annotations: list, extents: dict[int, tuple[float, float, float, float]]) -> None:
        """Count boxes that leave their images, and those that are x0 y0 x1 y1 as their masks have them."""
        placed = [annotation for annotation in annotations if annotation["image_id"] in self._images]
        if not placed:
            return
        boxes = np.array([annotation["bbox"] for annotation in placed], np.float64)
        sizes = np.array([self._images[annotation["image_id"]] for annotation in placed], np.float64)[:, ::-1]
        ends = boxes[:, :2] + boxes[:, 2:]
        outside = (boxes[:, :2] < -TOLERANCE).any(1) | (ends > sizes + TOLERANCE).any(1)
        self._left += int(outside.sum())
        self._boxes += len(placed)

        masked = [i for i, annotation in enumerate(placed) if id(annotation) in extents]
        if masked:
            masks = np.array([extents[id(placed[i])] for i in masked])
            as_sides = np.abs(np.concatenate([boxes[masked, :2], ends[masked]], 1) - masks).max(1) <= TOLERANCE
            as_corners = np.abs(boxes[masked] - masks).max(1) <= TOLERANCE
            corners = as_corners & ~as_sides
            self._compared += len(masked)
            self._corners += int(corners.sum())
            if self._first_corners is None and corners.any():
                self._first_corners = placed[masked[int(corners.argmax())]]

    def _check_totals(self) -> None:
        total = len(self.content["annotations"])
        if 2 * self._corners > self._compared:
            raise InputError(
                f"instances JSON {self.name}: {self._corners} of the {total} annotations have boxes that are x0 y0 x1 "
                f"y1 (XYXY) by their masks, such as {_describe(self._first_corners)}: boxes must be "
                "[x, y, width, height]"
            )
        if 2 * self._left > self._boxes:
            self.doubts.append(
                f"instances JSON {self.name}: {self._left} of the {total} boxes leave their images: are they x0 y0 x1 "
                "y1 (XYXY)? Boxes must be [x, y, width, height]"
            )

    def _area(self, annotation: dict) -> float:
        mask = annotation.get("segmentation")
        if mask is None or annotation["image_id"] not in self._images:
            return float(annotation["bbox"][2] * annotation["bbox"][3])
        if isinstance(mask, list):
            masks = rle.frPyObjects(mask, *self._images[annotation["image_id"]])
            return float(rle.area(masks[0] if len(masks) == 1 else rle.merge(masks)))
        return float(rle.area(_compressed(mask)))

    # --- messages ---------------------------------------------------------------------------------------------------

    def _require(self, problem: str, annotations: list, valid: list[bool], key: str | None = None) -> None:
        bad = [annotation for annotation, fine in zip(annotations, valid) if not fine]
        if bad:
            self._raise(bad, len(annotations), problem, key)

    def _raise(self, bad: list, total: int, problem: str, key: str | None = None) -> None:
        got = "" if key is None else f", which has {bad[0].get(key)!r}"
        raise InputError(
            f"instances JSON {self.name} has {len(bad)} annotations of {total} {problem}, such as "
            f"{_describe(bad[0])}{got}"
        )

    def _record_mend(self, count: int, problem: str, first: str, remedy: str) -> None:
        before, first_of_all = self._mends.get((problem, remedy), (0, first))
        self._mends[problem, remedy] = (before + count, first_of_all)


def _describe(annotation: dict) -> str:
    return f"annotation {annotation.get('id')!r} of image {annotation.get('image_id')!r}"


def _missing(annotations: Iterable[dict]) -> Missing:
    ids = [annotation["id"] for annotation in annotations]
    return Missing(len(ids), ids[0] if ids else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and value.is_integer()


def _is_area(value: Any) -> bool:
    return value is None or _is_number(value) and value >= 0


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(_is_number(x) for x in box) and min(box[2:]) >= 0


def _is_rle(mask: dict) -> bool:
    size, counts = mask.get("size"), mask.get("counts")
    return (
        isinstance(size, list)
        and len(size) == 2
        and all(_is_whole(side) for side in size)
        and (isinstance(counts, str) or isinstance(counts, list) and all(_is_whole(x) and x >= 0 for x in counts))
    )


def count_pixels(masks: Sequence[dict]) -> np.ndarray:
    """
    How many pixels the runs of RLE masks count, those of objects and those between; -1 where they are none.

    Args:
        masks: (N,) with "counts", text or a list.

    Returns:
        (N,) int64
    """
    total = np.array([sum(mask["counts"]) if isinstance(mask["counts"], list) else -1 for mask in masks], np.int64)
    texts = [i for i, mask in enumerate(masks) if isinstance(mask["counts"], str) and mask["counts"]]
    if not texts:
        return total
    # A letter has 5 bits of a number, the lowest first, and a sixth if the number goes on.
    coded = [masks[i]["counts"].encode("latin-1", "replace") for i in texts]
    letters = np.frombuffer(b"".join(coded), np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(coded)), [len(text) for text in coded])
    ends = np.r_[owner[1:] != owner[:-1], True]
    goes_on = letters & 32 > 0
    wrong = np.bincount(owner[(letters < 0) | (letters > 63) | ends & goes_on], minlength=len(coded)) > 0
    last = ~goes_on | ends
    first = np.flatnonzero(np.r_[True, last[:-1]])
    number = np.cumsum(last) - last
    place = np.arange(len(letters)) - first[number]
    wrong[owner[place > 6]] = True
    place = np.minimum(place, 6)
    runs = np.add.reduceat((letters & 31) << 5 * place, first)
    runs -= np.where(letters[last] & 16, 1 << 5 * (place[last] + 1), 0)  # negative
    # From the fourth on, a number is the difference to the one two before: three chains of sums in each mask.
    owner = owner[first]
    position = np.arange(len(owner)) - np.searchsorted(owner, owner)
    chain = 3 * owner + np.where(position == 0, 0, 2 - position % 2)
    order = np.argsort(chain, kind="stable")
    sums = np.cumsum(runs[order])
    starts = np.searchsorted(chain[order], chain[order])
    sums -= np.where(starts > 0, sums[starts - 1], 0)
    wrong[owner[order][sums < 0]] = True
    counted = np.zeros(len(coded), np.int64)
    np.add.at(counted, owner[order], sums)
    total[texts] = np.where(wrong, -1, counted)
    return total


def _compressed(mask: dict) -> dict:
    return rle.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
