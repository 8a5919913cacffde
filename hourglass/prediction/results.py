"""Predictions as JSON, in COCO's formats of results."""

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from pycocotools import mask as rle

from hourglass.files import write_whole
from hourglass.prediction.names import Names


class JsonList:
    """A JSON list that is written to its file item by item, and takes no memory. The file appears on :meth:`close`."""

    def __init__(self, path: Path):
        self._path = path
        handle, self._part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
        self._file = os.fdopen(handle, "w", encoding="utf-8")
        self._file.write("[")
        self._empty = True

    def add(self, item: Any) -> None:
        self._file.write(("\n" if self._empty else ",\n") + json.dumps(item, allow_nan=False))
        self._empty = False

    def close(self, complete: bool = True) -> None:
        """Finish the file; unless ``complete``, remove it."""
        self._file.write("\n]\n")
        self._file.close()
        if complete:
            os.chmod(self._part, 0o644)
            os.replace(self._part, self._path)
        else:
            os.unlink(self._part)


class Results:
    """
    What a model finds in images, written into a folder as it is found:

        predictions.json     instances, all of them: {"image_id", "category_id", "bbox", "score", "segmentation"}
        panoptic.json        {"image_id", "file_name", "segments_info"}, the segments' ids in the PNGs of panoptic/
        semantic.json        {"image_id", "category_id", "segmentation"} of each class that an image has
        images.json          the images with their files, and the categories

    those of them that the model gives. Boxes are (x, y, width, height) in pixels, masks compressed RLE.

    Args:
        folder: is made where it is missing.
        names: of the model's classes.
    """

    def __init__(self, folder: Path, names: Names):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._names = folder, names
        self._lists: dict[str, JsonList] = {}
        self._images: list[dict[str, Any]] = []

    def add(self, about: dict[str, Any], output: dict[str, Any]) -> None:
        """
        Args:
            about: the image: "id", "file_name", "height" and "width" at least.
            output: the model's.
        """
        self._images.append(about)
        if "instances" in output:
            entries = self._list("predictions")
            for entry in instances_to_coco_json(_plain(output["instances"]), about["id"]):
                entries.add({**entry, "category_id": self._names.category_id(entry["category_id"])})
        if output.get("panoptic_seg") is not None:
            self._list("panoptic").add(self._panoptic(about, *output["panoptic_seg"]))
        if "sem_seg" in output:
            entries = self._list("semantic")
            classes = output["sem_seg"].argmax(dim=0).cpu().numpy()
            for number in np.unique(classes).tolist():
                mask = _encode(classes == number)
                id = self._names.category_id(number, thing=False)
                entries.add({"image_id": about["id"], "category_id": id, "segmentation": mask})

    def close(self, complete: bool = True) -> list[str]:
        """The names of the files that are then there; none unless ``complete``."""
        for json_list in self._lists.values():
            json_list.close(complete)
        if not complete:
            return []
        content = {"images": self._images, "categories": self._names.categories()}
        write_whole(self._folder / "images.json", json.dumps(content, indent=1) + "\n")
        return [*(f"{name}.json" for name in self._lists), "images.json"]

    def _list(self, name: str) -> JsonList:
        if name not in self._lists:
            self._lists[name] = JsonList(self._folder / f"{name}.json")
        return self._lists[name]

    def _panoptic(self, about: dict[str, Any], segments: torch.Tensor, info: list[dict]) -> dict[str, Any]:
        ids = segments.cpu().numpy().astype(np.int64)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536 % 256], axis=-1).astype(np.uint8)
        name = f"{about['id']:012d}.png"
        (self._folder / "panoptic").mkdir(exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(colours).save(file, "PNG")
        write_whole(self._folder / "panoptic" / name, file.getvalue())
        listed = []
        for segment in info:
            id = self._names.category_id(segment["category_id"], bool(segment["isthing"]))
            listed.append({"id": int(segment["id"]), "category_id": id, "area": int((ids == segment["id"]).sum())})
        return {"image_id": about["id"], "file_name": name, "segments_info": listed}


def _plain(instances: Instances) -> Instances:
    """On the CPU, with boxes wherever there are masks: models of masks alone leave them 0."""
    instances = instances.to("cpu")
    if instances.has("pred_masks") and not (instances.has("pred_boxes") and instances.pred_boxes.tensor.any()):
        instances = Instances(instances.image_size, **instances.get_fields())
        masks = instances.pred_masks > 0
        instances.pred_boxes = BitMasks(masks).get_bounding_boxes() if len(masks) else Boxes(torch.zeros(0, 4))
    return instances


def _encode(mask: np.ndarray) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("utf-8")}
