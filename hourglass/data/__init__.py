"""The embedded demo data set, and its registration with Detectron2."""

import os

from hourglass.data.demo import write_demo
from hourglass.data.scenes import STUFF, THINGS, Scene, draw_scene

__all__ = ["DEMO_IMAGES", "STUFF", "THINGS", "Scene", "draw_scene", "register_demo", "write_demo"]

DEMO_IMAGES = {"train": 8000, "val": 100}


def register_demo(root: str | os.PathLike | None = None) -> None:
    """
    Register the data sets ``hourglass_demo_train`` and ``hourglass_demo_val`` with Detectron2.

    Nothing is drawn before a data set is loaded or its metadata's ``json_file`` is read, as `COCOEvaluator` does. The
    masks are RLE: a `DatasetMapper` takes them with ``instance_mask_format="bitmask"``.

    Args:
        root: the folder of the data set. None stands for ``$DETECTRON2_DATASETS/hourglass_demo`` as it is at the time
            of loading (``datasets/hourglass_demo`` where the variable is not set). Data sets that are registered
            already stay as they are where it is None, and move to `root` where it is not.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for split in DEMO_IMAGES:
        name = f"hourglass_demo_{split}"
        if name in DatasetCatalog.list():
            if root is None:
                continue
            DatasetCatalog.remove(name)
        metadata = _metadata(name, root, split)
        MetadataCatalog[name] = metadata
        DatasetCatalog.register(name, lambda metadata=metadata: _load(metadata))


def _demo_root(root: str | os.PathLike | None) -> str:
    if root is not None:
        return os.fspath(root)
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "hourglass_demo")


def _metadata(name: str, root: str | os.PathLike | None, split: str):
    from detectron2.data import Metadata

    class DemoMetadata(Metadata):
        """Metadata that draws the split when its annotations are asked for."""

        @property
        def json_file(self) -> str:
            write_demo(_demo_root(root), {split: DEMO_IMAGES[split]})
            return os.path.join(_demo_root(root), "annotations", f"instances_{split}.json")

        @property
        def image_root(self) -> str:
            return os.path.join(_demo_root(root), split)

    return DemoMetadata(
        name=name,
        evaluator_type="coco",
        thing_classes=list(THINGS),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(THINGS))},
    )


def _load(metadata) -> list:
    from detectron2.data.datasets.coco import load_coco_json

    return load_coco_json(metadata.json_file, metadata.image_root, metadata.name)
