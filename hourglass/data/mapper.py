"""Training images with panoptic annotations."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from hourglass.data.images import read_image
from hourglass.data.panoptic import read_panoptic_png, segment_ids
from hourglass.errors import InputError


class PanopticMapper:
    """
    A Detectron2 dataset mapper that reads the panoptic PNG of a record: each segment that is no crowd, thing or stuff,
    becomes one of the ``instances``. Segments that the augmentations leave no pixel of are dropped.

    Args:
        augmentations: Detectron2's, applied to the image and the segments.
        image_format: "RGB" or "BGR".
        stuff: whether segments of stuff are instances too, as for Mask2Former; False: things alone, as for Mask R-CNN.
        semantic: also give ``sem_seg``, for Detectron2's semantic heads.
        ignore_label: the class of ``sem_seg`` where nothing is annotated, or a crowd.
    """

    def __init__(
        self,
        augmentations: list[T.Augmentation | T.Transform],
        image_format: str = "RGB",
        stuff: bool = True,
        semantic: bool = False,
        ignore_label: int = 255,
    ):
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.stuff = stuff
        self.semantic = semantic
        self.ignore_label = ignore_label

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: with ``file_name``, ``pan_seg_file_name`` and ``segments_info``: {"id", "category_id", "iscrowd"} of
                each segment, the category a contiguous id.

        Returns:
            the record with ``image`` (3, H, W) uint8 and ``instances``: ``gt_classes`` (N,) int64, ``gt_masks``,
            ``BitMasks`` (N, H, W), and ``gt_boxes``; N is 0 where nothing is annotated. With ``semantic``,
            ``sem_seg``: (H, W) int64.

        Raises:
            InputError: for a PNG that is missing or cannot be read, or whose segments are not those of the record.
        """
        record = copy.deepcopy(record)
        image = read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(record, image)
        if "pan_seg_file_name" not in record:
            raise InputError(
                f"image {record['file_name']} has no pan_seg_file_name: PanopticMapper needs a panoptic data set"
            )
        path, segments = record.pop("pan_seg_file_name"), record.pop("segments_info")
        for unused in ("annotations", "sem_seg_file_name"):
            record.pop(unused, None)
        colours = read_panoptic_png(path)
        if colours.shape[:2] != image.shape[:2]:
            (height, width), (rows, columns) = image.shape[:2], colours.shape[:2]
            raise InputError(
                f"panoptic PNG {path} is {rows} x {columns} pixels, its image {record['file_name']} {height} x {width}"
            )

        inputs = T.AugInput(image)
        transforms = self.augmentations(inputs)
        image = inputs.image
        # Transformed as colours: resizing takes the nearest neighbour of 8-bit images only.
        ids = segment_ids(transforms.apply_segmentation(colours))

        masks, classes, annotated, gone = [], [], np.zeros(ids.shape, bool), set()
        sem_seg = np.full(ids.shape, self.ignore_label)
        for segment in segments:
            mask = ids == segment["id"]
            annotated |= mask
            if not mask.any():
                # Things may hide all of a stuff (they do in ADE20K as Mask2Former prepares it).
                if segment.get("isthing", True):
                    gone.add(segment["id"])
            elif not segment.get("iscrowd", 0):
                sem_seg[mask] = segment["category_id"]
                if self.stuff or segment.get("isthing", True):
                    masks.append(mask)
                    classes.append(segment["category_id"])
        if gone:
            _check_listed(gone, colours, path)
        # 0 is "no label"; 255, 255, 255 is what Detectron2 may pad with.
        unknown = set(np.unique(ids[~annotated]).tolist()) - {0, 0xFFFFFF}
        if unknown:
            raise InputError(
                f"panoptic PNG {path} has a segment {min(unknown)} that its annotation does not list among "
                f"{sorted(segment['id'] for segment in segments)}"
            )

        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        instances = Instances(image.shape[:2])
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        instances.gt_masks = BitMasks(np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool))
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        record["instances"] = instances
        if self.semantic:
            record["sem_seg"] = torch.from_numpy(sem_seg)
        return record


def _check_listed(numbers: set[int], colours: np.ndarray, path: str) -> None:
    """Segments that augmentations left nothing of are in the PNG all the same."""
    present = np.unique(segment_ids(colours)).tolist()
    missing = numbers - set(present)
    if missing:
        raise InputError(
            f"panoptic PNG {path} has no pixel of segment {min(missing)} that its annotation lists, only of {present}"
        )
