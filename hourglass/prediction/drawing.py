"""Drawing a model's output with Detectron2's ``Visualizer``."""

import colorsys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as rle

from hourglass.prediction.names import Names

# The longer side of a picture in pixels: images over it are drawn smaller, small ones larger.
LARGEST, SMALLEST = 2400, 800
# More objects than this have no labels and, if they have masks, no boxes: those would hide the image.
CROWDED = 30
# The same object in two models' outputs, by the IoU of its masks, or of its boxes.
SAME = 0.5


def draw(
    image: np.ndarray, output: dict[str, Any], names: Names, score: float, reference: dict[str, Any] | None = None
) -> np.ndarray:
    """
    Args:
        image: (H, W, 3) uint8 in BGR.
        output: the model's: panoptic segments are drawn where it has some, else classes of pixels and instances.
        names: of the classes.
        score: instances of at least this are drawn.
        reference: another model's output of the same image, whose colours the same objects get.

    Returns:
        (H', W', 3) uint8 in BGR, of the image's shape.
    """
    image, output, reference = _shrink(image, output, reference)
    scale = max(1.0, SMALLEST / max(image.shape[:2]))
    panoptic, semantic = output.get("panoptic_seg"), output.get("sem_seg")
    classes = None if semantic is None else semantic.argmax(dim=0).cpu()
    visualizer = Visualizer(image[:, :, ::-1], _metadata(names, output, classes), scale=scale)
    state = np.random.get_state()
    np.random.seed(0)  # colours are drawn from it
    try:
        if panoptic is not None:
            segments, info = panoptic[0].cpu(), panoptic[1]
            for segment in info:
                if not segment["isthing"]:
                    mask = (segments == segment["id"]).numpy()
                    name, number = names.name(segment["category_id"], thing=False), segment["category_id"]
                    visualizer.draw_binary_mask(mask, color=colour(number), text=name, alpha=0.3, area_threshold=0)
            reference_instances = None if reference is None else _thing_instances(*reference["panoptic_seg"])
            _draw_instances(visualizer, _thing_instances(segments, info), names, reference_instances)
        else:
            if classes is not None:
                visualizer.draw_sem_seg(classes, alpha=0.5)
            if "instances" in output:
                reference_instances = None if reference is None else _above_score(reference["instances"], score)
                _draw_instances(visualizer, _above_score(output["instances"], score), names, reference_instances)
    finally:
        np.random.set_state(state)
    return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])


def count(output: dict[str, Any], score: float) -> str:
    """The number of drawn objects, segments or classes, such as "3 objects"."""
    if output.get("panoptic_seg") is not None:
        return _plural(len(output["panoptic_seg"][1]), "segment")
    if "instances" in output:
        return _plural(int((output["instances"].scores >= score).sum()), "object")
    return _plural(len(output["sem_seg"].argmax(dim=0).unique()), "class", "classes") if "sem_seg" in output else ""


def side_by_side(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Join pictures (H, W, 3) of one size from left to right, each below its caption."""
    columns = []
    height, width = pictures[0].shape[:2]
    strip = max(24, round(0.045 * max(height, width)))
    for picture, caption in zip(pictures, captions):
        head = np.full((strip, width, 3), 255, np.uint8)
        size, _ = cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
        # Whatever the caption, it fits into its strip.
        font = min(0.55 * strip / size[1], 0.94 * width / size[0])
        thickness = max(1, round(1.4 * font))
        left, base = round(0.03 * width), round(strip / 2 + font * size[1] / 2)
        cv2.putText(head, caption, (left, base), cv2.FONT_HERSHEY_SIMPLEX, font, (30, 30, 30), thickness, cv2.LINE_AA)
        columns.append(np.concatenate([head, picture]))
        columns.append(np.full((strip + height, max(4, strip // 4), 3), 255, np.uint8))
    return np.concatenate(columns[:-1], axis=1)


def _draw_instances(visualizer: Visualizer, instances: Instances, names: Names, reference: Instances | None) -> None:
    """``reference``: the instances of another model."""
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    boxes = instances.pred_boxes.tensor if instances.has("pred_boxes") else None
    crowded = len(instances) > CROWDED
    drawn = None if boxes is None or not boxes.any() or (crowded and masks is not None) else instances.pred_boxes
    labels = None
    if not crowded:
        labels = [names.name(number) for number in instances.pred_classes.tolist()]
        if instances.has("scores"):
            labels = [f"{label} {100 * value:.0f}%" for label, value in zip(labels, instances.scores.tolist())]
    keypoints = instances.pred_keypoints if instances.has("pred_keypoints") else None
    visualizer.overlay_instances(
        boxes=drawn,
        labels=labels,
        masks=None if masks is None else list(masks),
        keypoints=keypoints,
        assigned_colors=_colours(instances, reference),
        alpha=0.45,
    )


def _colours(instances: Instances, reference: Instances | None) -> list[tuple[float, float, float]]:
    """A colour for each instance: that of the same object among the known ones, or one that none of these has."""
    numbers: list[int | None] = [None] * len(instances)
    if reference is not None and len(instances) and len(reference):
        overlap = _overlap(instances, reference)
        overlap[(instances.pred_classes[:, None] != reference.pred_classes[None]).numpy()] = 0
        while overlap.max() >= SAME:
            i, j = divmod(int(overlap.argmax()), overlap.shape[1])
            numbers[i] = j
            overlap[i], overlap[:, j] = 0, 0
    following = len(reference) if reference is not None else 0
    for i, number in enumerate(numbers):
        if number is None:
            numbers[i], following = following, following + 1
    return [colour(number) for number in numbers if number is not None]


def colour(number: int) -> tuple[float, float, float]:
    """RGB in [0, 1]: of neighbouring numbers far from each other."""
    return colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.9 - 0.35 * (number // 7 % 2), 1.0)


def _overlap(instances: Instances, reference: Instances) -> np.ndarray:
    """(N, M) IoU, of masks where both have them."""
    if instances.has("pred_masks") and reference.has("pred_masks"):
        # A box is not enough: a few pixels far away widen it.
        masks = (
            [rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in outputs.pred_masks.numpy()]
            for outputs in (instances, reference)
        )
        return np.array(rle.iou(*masks, [0] * len(reference)))
    return pairwise_iou(instances.pred_boxes, reference.pred_boxes).numpy()


def _thing_instances(segments: torch.Tensor, info: list[dict[str, Any]]) -> Instances:
    """The things among panoptic segments."""
    segments = segments.cpu()
    things = [segment for segment in info if segment["isthing"]]
    masks = [segments == segment["id"] for segment in things]
    instances = Instances(tuple(segments.shape))
    instances.pred_masks = torch.stack(masks) if masks else torch.zeros(0, *segments.shape, dtype=torch.bool)
    instances.pred_classes = torch.tensor([segment["category_id"] for segment in things], dtype=torch.int64)
    if things and all("score" in segment for segment in things):
        instances.scores = torch.tensor([float(segment["score"]) for segment in things])
    return instances


def _above_score(instances: Instances, score: float) -> Instances:
    instances = instances.to("cpu")
    return instances[instances.scores >= score] if instances.has("scores") else instances


def _shrink(
    image: np.ndarray, output: dict[str, Any], reference: dict[str, Any] | None
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any] | None]:
    """An image over the largest size, and what was found in it, made smaller: figures have so many pixels at most."""
    height, width = image.shape[:2]
    if max(height, width) <= LARGEST:
        return image, output, reference
    ratio = LARGEST / max(height, width)
    size = max(1, round(height * ratio)), max(1, round(width * ratio))
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, (height, width)))
    smaller = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    return (
        smaller,
        _shrink_output(output, size, rows, columns),
        reference and _shrink_output(reference, size, rows, columns),
    )


def _shrink_output(
    output: dict[str, Any], size: tuple[int, int], rows: torch.Tensor, columns: torch.Tensor
) -> dict[str, Any]:
    def pick(maps: torch.Tensor) -> torch.Tensor:
        return maps.cpu()[..., rows[:, None], columns[None]]

    smaller = dict(output)
    if "instances" in output:
        instances = output["instances"].to("cpu")
        scaled = Instances(size, **{key: value for key, value in instances.get_fields().items() if key != "pred_masks"})
        if instances.has("pred_boxes"):
            scaled.pred_boxes = instances.pred_boxes.clone()
            scaled.pred_boxes.scale(size[1] / instances.image_size[1], size[0] / instances.image_size[0])
        if instances.has("pred_masks"):
            scaled.pred_masks = pick(instances.pred_masks)
        if instances.has("pred_keypoints"):
            scaled.pred_keypoints = instances.pred_keypoints.clone()
            scaled.pred_keypoints[..., :2] *= size[1] / instances.image_size[1]
        smaller["instances"] = scaled
    if output.get("panoptic_seg") is not None:
        segments, info = output["panoptic_seg"]
        smaller["panoptic_seg"] = pick(segments), info
    if "sem_seg" in output:
        smaller["sem_seg"] = pick(output["sem_seg"])
    return smaller


def _metadata(names: Names, output: dict[str, Any], classes: torch.Tensor | None) -> Metadata:
    """Names and colours of all classes that there are."""
    numbers = [*names.things, *names.stuff]
    if output.get("panoptic_seg") is not None:
        numbers += [segment["category_id"] for segment in output["panoptic_seg"][1] or ()]
    if classes is not None:
        numbers += classes.unique().tolist()
    class_numbers = range(max(numbers, default=0) + 1)
    colours = [tuple(round(255 * part) for part in colour(number)) for number in class_numbers]
    return Metadata(
        name="drawn",
        thing_classes=[names.name(number) for number in class_numbers],
        stuff_classes=[names.name(number, thing=False) for number in class_numbers],
        thing_colors=colours,
        stuff_colors=colours,
    )


def _plural(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
