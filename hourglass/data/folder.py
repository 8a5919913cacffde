"""Where the files of a data set in COCO's layout are."""

import os


class CocoFolder:
    """
    Paths under Detectron2's names, for its metadata: they follow the environment until a `root` is given.

        root/{split}/                                 images
        root/annotations/instances_{split}.json       boxes and masks
        root/annotations/panoptic_{split}.json        panoptic segments, their ids in the PNGs of panoptic_{split}/

    Attributes:
        root: the folder; None stands for what `variable` names, and where that is not set (or None) for ``folder`` in
            ``$DETECTRON2_DATASETS`` (``datasets`` without it), as they are at the time of reading.
        split: e.g. "train".
        folder: the data set's name among Detectron2's data sets.
        variable: of the environment.
    """

    root: str | os.PathLike | None
    split: str
    folder: str
    variable: str | None = None

    @property
    def path(self) -> str:
        if self.root is not None:
            return os.fspath(self.root)
        if named := self.variable and os.environ.get(self.variable):
            return os.path.expanduser(named)
        return os.path.join(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS") or "datasets"), self.folder)

    @property
    def image_root(self) -> str:
        return os.path.join(self.path, self.split)

    @property
    def json_file(self) -> str:
        return self.annotations(f"instances_{self.split}.json")

    @property
    def panoptic_json(self) -> str:
        return self.annotations(f"panoptic_{self.split}.json")

    @property
    def panoptic_root(self) -> str:
        return os.path.join(self.path, "annotations", f"panoptic_{self.split}")

    def annotations(self, name: str) -> str:
        """The path of a file of annotations."""
        return os.path.join(self.path, "annotations", name)
