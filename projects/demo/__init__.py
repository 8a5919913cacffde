"""
The demo's scenes, drawn from a seed, as data sets of instances and of panoptic segments. Nothing is downloaded.
"""

import os
from functools import partial
from typing import Any

from hourglass.data.folder import CocoFolder
from projects.demo.scenes import STUFF, THINGS, Scene, draw_scene
from projects.demo.writing import CATEGORIES, write_demo

__all__ = ["DEMO_IMAGES", "STUFF", "THINGS", "Scene", "draw_scene", "register_demo", "write_demo"]

DEMO_IMAGES = {"train": 8000, "val": 100, "search": 200}


def register_demo(root: str | os.PathLike | None = None) -> None:
    """
    Register the data sets ``hourglass_demo_train``, ``hourglass_demo_val`` and ``hourglass_demo_search``, which plans
    are chosen on, with Detectron2; the same images with instances and panoptic segments as
    ``hourglass_demo_panoptic_train`` and so on; and such sets of scenes in which two kinds of objects each share a
    range of hues as ``hourglass_demo_coloured_train`` and so on.

    Nothing is drawn before a data set is loaded or its metadata's ``json_file`` or ``panoptic_json`` is read, as
    evaluators do. The masks are RLE: a `DatasetMapper` takes them with ``instance_mask_format="bitmask"``.

    Args:
        root: the folder of the data sets; that of the coloured scenes is ``coloured`` in it. None stands for
            ``$DETECTRON2_DATASETS/hourglass_demo`` as it is at the time of loading (``datasets/hourglass_demo`` where
            the variable is not set). Data sets that are registered already stay as they are where it is None, and move
            to `root` where it is not.
    """
    from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
    from detectron2.data.datasets.coco import load_coco_json

    from hourglass.data.panoptic import PanopticMetadata, register_panoptic_metadata

    class InstanceDemo(_Demo, Metadata):
        pass

    class PanopticDemo(_Demo, PanopticMetadata):
        categories = CATEGORIES

    class ColouredDemo(_ColouredDemo, PanopticMetadata):
        categories = CATEGORIES

    def load_instances(metadata: Metadata) -> list:
        return load_coco_json(metadata.json_file, metadata.image_root, metadata.name)

    kinds: dict[str, Any] = {
        "hourglass_demo": InstanceDemo,
        "hourglass_demo_panoptic": PanopticDemo,
        "hourglass_demo_coloured": ColouredDemo,
    }
    for split in DEMO_IMAGES:
        for prefix, kind in kinds.items():
            name = f"{prefix}_{split}"
            if name in DatasetCatalog.list():
                if root is None:
                    continue
                DatasetCatalog.remove(name)
            if kind is not InstanceDemo:
                register_panoptic_metadata(kind(name=name, root=root, split=split))
            else:
                metadata = MetadataCatalog[name] = InstanceDemo(
                    name=name,
                    root=root,
                    split=split,
                    evaluator_type="coco",
                    thing_classes=list(THINGS),
                    thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(THINGS))},
                )
                DatasetCatalog.register(name, partial(load_instances, metadata))


class _Demo(CocoFolder):
    """The split is drawn when its annotations are asked for."""

    folder = "hourglass_demo"
    coloured = False

    def annotations(self, name: str) -> str:
        write_demo(self.path, {self.split: DEMO_IMAGES[self.split]}, coloured=self.coloured)
        return super().annotations(name)


class _ColouredDemo(_Demo):
    coloured = True

    @property
    def path(self) -> str:
        return os.path.join(super().path, "coloured")
