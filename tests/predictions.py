"""What a model finds in an image, names of its classes, and videos."""

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from hourglass.prediction.names import Names

NAMES = Names({0: "disc", 1: "square"}, {2: "sky", 3: "grass"}, {0: 1, 1: 5}, {2: 7, 3: 9})


def make_instances(boxes, classes, scores=None, size=(60, 80), masks=True) -> Instances:
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.tensor(scores if scores is not None else [0.9] * len(classes))
    if masks:
        drawn = torch.zeros(len(classes), *size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(drawn, instances.pred_boxes.tensor.int().tolist()):
            mask[top:bottom, left:right] = True
        instances.pred_masks = drawn
    return instances


def write_video(path, frames: int, size=(64, 48)) -> list[np.ndarray]:
    """A video in which each frame is of one brightness."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, size)
    drawn = [np.full((size[1], size[0], 3), 40 * (i + 1), np.uint8) for i in range(frames)]
    for frame in drawn:
        writer.write(frame)
    writer.release()
    return drawn
