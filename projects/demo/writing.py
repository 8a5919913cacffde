"""
The demo data set on disk: scenes drawn from a seed, in the layout of COCO.

    root/{split}/000000000001.jpg                           images
    root/annotations/instances_{split}.json                 boxes and masks (compressed RLE)
    root/annotations/panoptic_{split}.json                  the panoptic segments
    root/annotations/panoptic_{split}/000000000001.png      their ids: R + 256 G + 65536 B
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from projects.demo.scenes import COLOURED_RECIPE, RECIPE, SIZE, STUFF, THINGS, draw_scene

CATEGORIES = [
    {"id": i, "name": name, "supercategory": "thing" if i <= len(THINGS) else "stuff", "isthing": int(i <= len(THINGS))}
    for i, name in enumerate([*THINGS, *STUFF], start=1)
]


def write_demo(
    root: str | os.PathLike,
    images: dict[str, int],
    seed: int = 0,
    workers: int | None = None,
    coloured: bool = False,
) -> None:
    """
    Draw splits of the demo data set, unless they are there already. The same arguments give the same bytes, and image
    i of a split is the same whatever the number of images.

    A split appears under its names only once it is whole. Processes that want the same one wait for the first of them.
    A split that was drawn with another seed, number, recipe or colouring is replaced.

    Args:
        root: the folder of the data set, made where it is missing.
        images: how many images each split has, such as ``{"train": 4000, "val": 100}``.
        seed: of the whole set, in [0, 2**32).
        workers: threads that draw; by default one a processor.
        coloured: draw scenes in which two kinds of objects each share a range of hues.

    Raises:
        ValueError: for a seed, a number of images or of workers out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    for split, count in images.items():
        if count < 1:
            raise ValueError(f"images must give each split at least 1 image, got {count} for {split!r}")

    root = os.fspath(root)
    os.makedirs(root, exist_ok=True)
    for split, count in images.items():
        info = _info(split, count, seed, coloured)
        if _is_complete(root, split, info):
            continue
        with _locked(root), tempfile.TemporaryDirectory(prefix=f".{split}-", dir=root) as fresh:
            if not _is_complete(root, split, info):  # by now another process may have drawn it
                _write_split(fresh, split, info, workers)
                _publish(fresh, root, split, info)


class _Paths(NamedTuple):
    """What a split consists of. The instances come last: a split that has them is complete."""

    images: str
    panoptic_masks: str
    panoptic: str
    instances: str


def _paths(root: str, split: str) -> _Paths:
    annotations = os.path.join(root, "annotations")
    return _Paths(
        images=os.path.join(root, split),
        panoptic_masks=os.path.join(annotations, f"panoptic_{split}"),
        panoptic=os.path.join(annotations, f"panoptic_{split}.json"),
        instances=os.path.join(annotations, f"instances_{split}.json"),
    )


def _info(split: str, count: int, seed: int, coloured: bool) -> dict[str, Any]:
    info = {"description": "hourglass demo", "recipe": RECIPE, "seed": seed, "split": split, "images": count}
    return {**info, "recipe": COLOURED_RECIPE, "coloured": True} if coloured else info


def _is_complete(root: str, split: str, info: dict[str, Any]) -> bool:
    paths = _paths(root, split)
    if not all(os.path.exists(path) for path in paths):
        return False
    try:
        with open(paths.instances) as file:
            return json.load(file)["info"] == info
    except (ValueError, KeyError, TypeError):  # not a file of ours
        return False


@contextmanager
def _locked(root: str) -> Iterator[None]:
    """
    One process at a time. The lock is on the folder, so it leaves no file behind and ends with the process. A file
    system that cannot lock a folder (some network ones) goes without: then the work is done twice, which does no harm.
    """
    folder = None
    try:
        import fcntl

        folder = os.open(root, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _publish(fresh: str, root: str, split: str, info: dict[str, Any]) -> None:
    """Move a split from the folder `fresh`, with the old one, if any, taking its place there."""
    old, new, target = os.path.join(fresh, "old"), _paths(fresh, split), _paths(root, split)
    os.makedirs(os.path.join(root, "annotations"), exist_ok=True)
    os.mkdir(old)
    try:
        for i, path in reversed(list(enumerate(target))):
            if os.path.exists(path):
                os.rename(path, os.path.join(old, str(i)))
        for source, path in zip(new, target):
            os.rename(source, path)
    except OSError:
        # Without a lock, another process may have come first: then its split is as good.
        if not _is_complete(root, split, info):
            raise


def _write_split(root: str, split: str, info: dict[str, Any], workers: int | None) -> None:
    paths = _paths(root, split)
    os.makedirs(paths.images)
    os.makedirs(paths.panoptic_masks)
    # Threads are enough, as numpy and OpenCV release the interpreter's lock. Processes would have to be spawned (a fork
    # does not go with torch's threads), which runs an unguarded script of the caller's a second time.
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        drawn = pool.map(partial(_write_image, paths, info), range(info["images"]))
        records = list(tqdm(drawn, desc=f"drawing demo {split}", total=info["images"], unit="image"))

    instances = [instance for record in records for instance in record.instances]
    things = [{key: kind[key] for key in ("id", "name", "supercategory")} for kind in CATEGORIES if kind["isthing"]]
    common = {"info": info, "licenses": [], "images": [record.image for record in records]}
    _write_json(
        paths.panoptic,
        {
            **common,
            "annotations": [record.panoptic for record in records],
            "categories": CATEGORIES,
        },
    )
    _write_json(
        paths.instances,
        {
            **common,
            "annotations": [{"id": i, **instance} for i, instance in enumerate(instances, start=1)],
            "categories": things,
        },
    )


class _Record(NamedTuple):
    image: dict[str, Any]
    instances: list[dict[str, Any]]  # without their ids, which count through the split
    panoptic: dict[str, Any]


def _write_image(paths: _Paths, info: dict[str, Any], index: int) -> _Record:
    """Draw image `index`, from 0, of a split and write its two files; its id is index + 1."""
    scene = draw_scene((info["seed"], zlib.crc32(info["split"].encode()), index), info.get("coloured", False))
    image_id = index + 1
    name = f"{image_id:012d}"
    _write_image_file(os.path.join(paths.images, f"{name}.jpg"), scene.image, [cv2.IMWRITE_JPEG_QUALITY, 95])

    encoded = rle.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0), dtype=np.uint8))
    instances = [
        {
            "image_id": image_id,
            "category_id": label + 1,
            "bbox": box,
            "area": area,
            "iscrowd": 0,
            "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
        }
        for label, mask, box, area in zip(
            scene.labels, encoded, rle.toBbox(encoded).tolist(), rle.area(encoded).tolist()
        )
    ]

    # Segments are numbered from 1: the objects, then each kind of ground that is not wholly hidden.
    segments = np.zeros((SIZE, SIZE), np.uint8)
    segments_info = []
    for segment, (mask, instance) in enumerate(zip(scene.masks, instances), start=1):
        segments[mask] = segment
        segments_info.append(_segment(segment, instance["category_id"], instance["area"], instance["bbox"]))
    ground = segments == 0
    for kind in range(len(STUFF)):
        mask = ground & (scene.stuff == kind)
        area = int(np.count_nonzero(mask))
        if area:
            segment = len(segments_info) + 1
            segments[mask] = segment
            box = cv2.boundingRect(mask.astype(np.uint8))
            segments_info.append(_segment(segment, _stuff_category(kind), area, box))
    zeros = np.zeros_like(segments)  # fewer than 256 segments: G and B stay 0
    _write_image_file(os.path.join(paths.panoptic_masks, f"{name}.png"), np.dstack([segments, zeros, zeros]), [])

    return _Record(
        image={"id": image_id, "file_name": f"{name}.jpg", "height": SIZE, "width": SIZE},
        instances=instances,
        panoptic={"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments_info},
    )


def _segment(segment: int, category: int, area: int, box: Sequence[int]) -> dict[str, Any]:
    return {"id": segment, "category_id": category, "area": area, "bbox": [int(x) for x in box], "iscrowd": 0}


def _stuff_category(kind: int) -> int:
    return len(THINGS) + 1 + kind


def _write_image_file(path: str, image: np.ndarray, options: list[int]) -> None:
    """Write (h, w, 3) uint8 RGB, in the format that the name's ending tells."""
    # Not cv2.imwrite: it answers a full disk with False and no more.
    done, data = cv2.imencode(os.path.splitext(path)[1], image[..., ::-1], options)
    assert done, f"OpenCV could not encode {path}"
    with open(path, "wb") as file:
        file.write(data.tobytes())


def _write_json(path: str, content: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(content, file, separators=(",", ":"))
