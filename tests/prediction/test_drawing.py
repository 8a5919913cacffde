import numpy as np
import pytest
import torch
from detectron2.structures import Boxes

from hourglass.prediction.drawing import CROWDED, LARGEST, _colours, colour, count, draw, side_by_side
from tests.predictions import NAMES, make_instances


def grey(height: int = 60, width: int = 80) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def changed(picture: np.ndarray) -> np.ndarray:
    """Where a picture of a grey image is not grey."""
    return (np.abs(picture.astype(int) - 128) > 12).any(-1)


@pytest.mark.parametrize("masks", [True, False])
def test_instances_over_the_score_are_drawn_where_they_are(masks):
    output = {"instances": make_instances([[10, 20, 30, 40], [50, 5, 70, 15]], [0, 1], [0.8, 0.3], masks=masks)}
    picture = draw(grey(), output, NAMES, 0.5)
    scale = picture.shape[1] / 80
    assert picture.dtype == np.uint8 and abs(picture.shape[0] - 60 * scale) < 2 and max(picture.shape) >= 800
    part = changed(picture)
    # Inside with a mask, and its border without; nothing where the second is, whose score is low.
    assert part[int(28 * scale) : int(32 * scale), int(18 * scale) : int(22 * scale)].any() == masks
    assert part[int(30 * scale), int(9 * scale) : int(11 * scale)].any()
    assert not part[int(5 * scale) : int(15 * scale), int(50 * scale) : int(70 * scale)].any()
    low = draw(grey(), output, NAMES, 0.1)
    assert changed(low)[int(5 * scale) : int(15 * scale), int(50 * scale) : int(70 * scale)].any()
    assert count(output, 0.5) == "1 object" and count(output, 0.1) == "2 objects"


def test_an_image_without_objects_is_the_image():
    nothing = {"instances": make_instances([], [])}
    assert not changed(draw(grey(), nothing, NAMES, 0.5)).any() and count(nothing, 0.5) == "0 objects"
    empty = {"panoptic_seg": (torch.zeros(60, 80, dtype=torch.int32), [])}
    assert not changed(draw(grey(), empty, NAMES, 0.5)).any()


def test_the_same_object_has_the_same_colour():
    reference = make_instances([[0, 0, 20, 20], [30, 30, 50, 50], [60, 0, 80, 20]], [0, 0, 1])
    # The second and the first a little moved, one of another class in the third's place, and a new one.
    compared = make_instances([[31, 30, 51, 50], [0, 1, 20, 21], [60, 0, 80, 20], [0, 40, 10, 50]], [0, 0, 0, 0])
    assert _colours(reference, None) == [colour(0), colour(1), colour(2)]
    assert _colours(compared, reference) == [colour(1), colour(0), colour(3), colour(4)]
    # Of models of masks, whose boxes are 0.
    compared.pred_boxes = Boxes(torch.zeros(4, 4))
    assert _colours(compared, reference) == [colour(1), colour(0), colour(3), colour(4)]
    assert len({colour(number) for number in range(60)}) == 60


def test_a_crowd_has_no_labels(monkeypatch):
    import hourglass.prediction.drawing as drawing

    received = []

    class Watched(drawing.Visualizer):
        def overlay_instances(self, **options):
            received.append(options)
            return super().overlay_instances(**options)

    monkeypatch.setattr(drawing, "Visualizer", Watched)
    for number in (CROWDED, CROWDED + 1):
        boxes = [[i % 8 * 10, i // 8 * 10, i % 8 * 10 + 8, i // 8 * 10 + 8] for i in range(number)]
        draw(grey(), {"instances": make_instances(boxes, [0] * number)}, NAMES, 0.5)
    assert received[0]["labels"][0] == "disc 90%" and received[0]["boxes"] is not None
    assert received[1]["labels"] is None and received[1]["boxes"] is None and len(received[1]["masks"]) == CROWDED + 1


def test_panoptic_segments_and_classes_of_pixels():
    segments = torch.zeros(60, 80, dtype=torch.int32)
    segments[:30], segments[40:, :20] = 1, 2
    info = [{"id": 1, "isthing": False, "category_id": 2}, {"id": 2, "isthing": True, "category_id": 0}]
    output = {"panoptic_seg": (segments, info)}
    part = changed(draw(grey(), output, NAMES, 0.5))
    scale = part.shape[1] / 80
    assert (
        part[: int(29 * scale)].mean() > 0.9 and part[int(42 * scale) : int(58 * scale), : int(18 * scale)].mean() > 0.5
    )
    assert not part[int(42 * scale) :, int(50 * scale) :].any() and count(output, 0.5) == "2 segments"
    assert info[0].keys() == {"id", "isthing", "category_id"}  # nothing is added to the model's output

    scores = torch.zeros(9, 60, 80)  # more classes than have names
    scores[3, :30], scores[8, 30:] = 1, 1
    part = changed(draw(grey(), {"sem_seg": scores}, NAMES, 0.5))
    assert part.mean() > 0.9 and count({"sem_seg": scores}, 0.5) == "2 classes"


def test_a_wide_image_is_drawn_smaller():
    size = (300, 8000)
    output = {"instances": make_instances([[4000, 0, 8000, 300]], [1], size=size)}
    segments = torch.zeros(size, dtype=torch.int32)
    segments[:, :4000] = 1
    panoptic = {"panoptic_seg": (segments, [{"id": 1, "isthing": True, "category_id": 0}])}
    for drawn_output, inside in ((output, slice(1300, 2300)), (panoptic, slice(100, 1100))):
        picture = draw(grey(*size), drawn_output, NAMES, 0.5)
        assert abs(picture.shape[1] - LARGEST) <= 1 and abs(picture.shape[0] - 90) <= 1
        outside = slice(100, 1100) if inside.start > 1200 else slice(1300, 2300)
        assert changed(picture)[20:80, inside].mean() > 0.5 and not changed(picture)[20:80, outside].any()
    assert output["instances"].image_size == size  # what the model gave stays as it is
    assert output["instances"].pred_boxes.tensor.tolist() == [[4000, 0, 8000, 300]]


@pytest.mark.parametrize("size", [(40, 300), (300, 40)])
def test_captions_fit(size):
    pictures = [grey(*size), grey(*size)]
    joined = side_by_side(pictures, ["unmodified: 375 objects", "expedited: 1 object"])
    strip = joined.shape[0] - size[0]
    head = (joined[:strip] < 128).any(-1)
    left, right = head[:, : size[1]], head[:, -size[1] :]
    assert left.any() and right.any()
    for part in (left, right):  # nothing touches the border
        assert not part[0].any() and not part[:, 0].any() and not part[:, -1].any()
    assert not head[:, size[1] : -size[1]].any()
    assert np.array_equal(joined[strip:, : size[1]], pictures[0])
