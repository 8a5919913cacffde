"""
BBBC038 (the 2018 Data Science Bowl's nuclei, https://bbbc.broadinstitute.org/BBBC038) in COCO's layout.

    root/{split}/*.png                                images, 8-bit RGB
    root/annotations/instances_{split}.json           a mask a nucleus (compressed RLE)
    root/annotations/panoptic_{split}.json            the panoptic segments: nuclei and background
    root/annotations/panoptic_{split}/*.png           their ids: R + 256 G + 65536 B
"""

import os

from hourglass.data.folder import CocoFolder
from hourglass.data.panoptic import PanopticMetadata, register_panoptic_metadata
from hourglass.errors import InputError

VARIABLE = "HOURGLASS_NUCLEI"
CATEGORIES = ["nucleus", "background"]


def register_nuclei(root: str | os.PathLike | None = None) -> None:
    """
    Register ``hourglass_nuclei_train`` and ``hourglass_nuclei_val`` with Detectron2: nuclei as instances, and with the
    background as panoptic segments. Nothing is read before it is asked for.

    Args:
        root: the folder of the data set. None stands for ``$HOURGLASS_NUCLEI`` as it is at the time of loading, or,
            where that is not set, ``$DETECTRON2_DATASETS/nuclei`` (``datasets/nuclei`` without either). Data sets that
            are registered already stay as they are where it is None, and move to `root` where it is not.
    """
    from detectron2.data import DatasetCatalog

    for split in ("train", "val"):
        name = f"hourglass_nuclei_{split}"
        if name in DatasetCatalog.list():
            if root is None:
                continue
            DatasetCatalog.remove(name)
        register_panoptic_metadata(_Nuclei(name=name, root=root, split=split))


class _Nuclei(CocoFolder, PanopticMetadata):
    folder = "nuclei"
    variable = VARIABLE

    @property
    def categories(self) -> list[dict]:
        categories = super().categories
        names = [category["name"] for category in categories]
        if names != CATEGORIES:
            raise InputError(f"panoptic JSON {self.panoptic_json} has the categories {names}, not {CATEGORIES}")
        return categories
