"""Drawing what a model finds, by Detectron2's ``Visualizer``."""

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
    image: np.ndarray, output: dict[str, Any], names: Names, score: float, known: dict[str, Any] | None = None
) -> np.ndarray:
    """
    Args:
        image: (H, W, 3) uint8 in BGR.
        output: the model's: panoptic segments are drawn where it has some, else classes of pixels and instances.
        names: of the classes.
        score: instances of at least this are drawn.
        known: another model's output of the same image, whose colours the same objects get.

    Returns:
        (H', W', 3) uint8 in BGR, of the image's shape.
    """
    image, output, known = _shrink(image, output, known)
    scale = max(1.0, SMALLEST / max(image.shape[:2]))
    panoptic, semantic = output.get("panoptic_seg"), output.get("sem_seg")
    classes = None if semantic is None else semantic.argmax(dim=0).cpu()
    visualizer = Visualizer(image[:, :, ::-1], _metadata(names, output, classes), scale=scale)
    state = np.random.get_state()
    np.random.seed(0)  # colours are drawn from it
    try:
        if panoptic is not None:
            segments, info = panoptic[0].cpu(), panoptic[1]
            for each in info:
                if not each["isthing"]:
                    mask = (segments == each["id"]).numpy()
                    name, number = names.name(each["category_id"], thing=False), each["category_id"]
                    visualizer.draw_binary_mask(mask, color=colour(number), text=name, alpha=0.3, area_threshold=0)
            others = None if known is None else _things(*known["panoptic_seg"])
            _draw_instances(visualizer, _things(segments, info), names, others)
        else:
            if classes is not None:
                visualizer.draw_sem_seg(classes, alpha=0.5)
            if "instances" in output:
                others = None if known is None else _over(known["instances"], score)
                _draw_instances(visualizer, _over(output["instances"], score), names, others)
    finally:
        np.random.set_state(state)
    return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])


def count(output: dict[str, Any], score: float) -> str:
    """How much is drawn, in words."""
    if output.get("panoptic_seg") is not None:
        return _plural(len(output["panoptic_seg"][1]), "segment")
    if "instances" in output:
        return _plural(int((output["instances"].scores >= score).sum()), "object")
    return _plural(len(output["sem_seg"].argmax(dim=0).unique()), "class", "classes") if "sem_seg" in output else ""


def beside(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Pictures (H, W, 3) of one size beside each other, each under its caption."""
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


def _draw_instances(visualizer: Visualizer, found: Instances, names: Names, known: Instances | None) -> None:
    """``known``: those of another model."""
    masks = found.pred_masks.numpy() if found.has("pred_masks") else None
    boxes = found.pred_boxes.tensor if found.has("pred_boxes") else None
    crowded = len(found) > CROWDED
    drawn = None if boxes is None or not boxes.any() or (crowded and masks is not None) else found.pred_boxes
    labels = None
    if not crowded:
        labels = [names.name(number) for number in found.pred_classes.tolist()]
        if found.has("scores"):
            labels = [f"{label} {100 * value:.0f}%" for label, value in zip(labels, found.scores.tolist())]
    keypoints = found.pred_keypoints if found.has("pred_keypoints") else None
    visualizer.overlay_instances(
        boxes=drawn,
        labels=labels,
        masks=None if masks is None else list(masks),
        keypoints=keypoints,
        assigned_colors=_colours(found, known),
        alpha=0.45,
    )


def _colours(found: Instances, known: Instances | None) -> list[tuple[float, float, float]]:
    """A colour for each instance: that of the same object among the known ones, or one that none of these has."""
    numbers: list[int | None] = [None] * len(found)
    if known is not None and len(found) and len(known):
        overlap = _overlap(found, known)
        overlap[(found.pred_classes[:, None] != known.pred_classes[None]).numpy()] = 0
        while overlap.max() >= SAME:
            i, j = divmod(int(overlap.argmax()), overlap.shape[1])
            numbers[i] = j
            overlap[i], overlap[:, j] = 0, 0
    following = len(known) if known is not None else 0
    for i, number in enumerate(numbers):
        if number is None:
            numbers[i], following = following, following + 1
    return [colour(number) for number in numbers if number is not None]


def colour(number: int) -> tuple[float, float, float]:
    """RGB in [0, 1]: of neighbouring numbers far from each other."""
    return colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.9 - 0.35 * (number // 7 % 2), 1.0)


def _overlap(found: Instances, known: Instances) -> np.ndarray:
    """(N, M) IoU, of masks where both have them."""
    if found.has("pred_masks") and known.has("pred_masks"):
        # A box is not enough: a few pixels far away widen it.
        masks = (
            [rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in each.pred_masks.numpy()]
            for each in (found, known)
        )
        return np.array(rle.iou(*masks, [0] * len(known)))
    return pairwise_iou(found.pred_boxes, known.pred_boxes).numpy()


def _things(segments: torch.Tensor, info: list[dict[str, Any]]) -> Instances:
    """The things among panoptic segments."""
    segments = segments.cpu()
    things = [each for each in info if each["isthing"]]
    masks = [segments == each["id"] for each in things]
    found = Instances(tuple(segments.shape))
    found.pred_masks = torch.stack(masks) if masks else torch.zeros(0, *segments.shape, dtype=torch.bool)
    found.pred_classes = torch.tensor([each["category_id"] for each in things], dtype=torch.int64)
    if things and all("score" in each for each in things):
        found.scores = torch.tensor([float(each["score"]) for each in things])
    return found


def _over(found: Instances, score: float) -> Instances:
    found = found.to("cpu")
    return found[found.scores >= score] if found.has("scores") else found


def _shrink(
    image: np.ndarray, output: dict[str, Any], known: dict[str, Any] | None
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any] | None]:
    """An image over the largest size, and what was found in it, made smaller: figures have so many pixels at most."""
    height, width = image.shape[:2]
    if max(height, width) <= LARGEST:
        return image, output, known
    ratio = LARGEST / max(height, width)
    size = max(1, round(height * ratio)), max(1, round(width * ratio))
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, (height, width)))
    smaller = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    return smaller, _shrink_output(output, size, rows, columns), known and _shrink_output(known, size, rows, columns)


def _shrink_output(
    output: dict[str, Any], size: tuple[int, int], rows: torch.Tensor, columns: torch.Tensor
) -> dict[str, Any]:
    def pick(maps: torch.Tensor) -> torch.Tensor:
        return maps.cpu()[..., rows[:, None], columns[None]]

    smaller = dict(output)
    if "instances" in output:
        found = output["instances"].to("cpu")
        made = Instances(size, **{key: value for key, value in found.get_fields().items() if key != "pred_masks"})
        if found.has("pred_boxes"):
            made.pred_boxes = found.pred_boxes.clone()
            made.pred_boxes.scale(size[1] / found.image_size[1], size[0] / found.image_size[0])
        if found.has("pred_masks"):
            made.pred_masks = pick(found.pred_masks)
        if found.has("pred_keypoints"):
            made.pred_keypoints = found.pred_keypoints.clone()
            made.pred_keypoints[..., :2] *= size[1] / found.image_size[1]
        smaller["instances"] = made
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
        numbers += [each["category_id"] for each in output["panoptic_seg"][1] or ()]
    if classes is not None:
        numbers += classes.unique().tolist()
    every = range(max(numbers, default=0) + 1)
    colours = [tuple(round(255 * part) for part in colour(number)) for number in every]
    return Metadata(
        name="drawn",
        thing_classes=[names.name(number) for number in every],
        stuff_classes=[names.name(number, thing=False) for number in every],
        thing_colors=colours,
        stuff_colors=colours,
    )


def _plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
