"""What becomes of detections: each kind by hand, and sums that add up whatever the detections."""

from functools import partial

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hourglass import InputError
from hourglass.evaluation.agreement import OutputRecorder
from hourglass.report.losses import (
    CLASS,
    DUPLICATE,
    IGNORED,
    KEPT,
    KINDS,
    LOST,
    MOVED,
    NEW,
    OF_FIRST,
    OF_SECOND,
    RIGHT,
    WRONG,
    Detections,
    Overlap,
    Truth,
    check,
    find_losses,
    find_tasks,
    match,
    overlap,
)
from tests.models import detector_output

SIZE = (60, 100)
detections = partial(detector_output, SIZE)
NAMES = Metadata(thing_classes=["car", "dog"], stuff_classes=["sky", "sea", "sand"], ignore_label=255)


def tasks(first: list[dict], second: list[dict], records: list[dict], score: float = 0.5):
    recorders = []
    for outputs in (first, second):
        recorder = OutputRecorder()
        for record, output in zip(records, outputs):
            recorder.process([record], [output])
        recorders.append(recorder)
    return find_tasks(*recorders, records, NAMES, score)


def objects(*boxes, classes, crowd=(), masks: bool = True) -> list[dict]:
    annotations = []
    for i, (box, number) in enumerate(zip(boxes, classes)):
        left, top, right, bottom = box
        annotation = {
            "bbox": list(box),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": number,
            "iscrowd": int(i in crowd),
        }
        if masks:
            annotation["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        annotations.append(annotation)
    return annotations


# Eight detections of each model, in which every kind occurs:
#                unmodified                      expedited
BY_HAND = [
    ("kept", [0, 0, 20, 20], 0, 0.9, [0, 0, 20, 19], 0, 0.9),  # IoU 0.95
    ("kept", [30, 0, 50, 20], 1, 0.9, [32, 0, 50, 20], 1, 0.6),  # 0.9, less sure
    ("moved", [60, 0, 80, 20], 0, 0.9, [60, 0, 80, 10], 0, 0.9),  # 0.5
    ("class changed", [0, 30, 20, 50], 0, 0.9, [0, 30, 20, 50], 1, 0.9),
    ("lost", [30, 30, 50, 50], 0, 0.8, None, None, None),
    ("lost", [60, 30, 80, 50], 1, 0.7, [60, 30, 80, 50], 1, 0.4),  # there, under the score
    ("duplicate", None, None, None, [0, 0, 20, 20], 1, 0.6),  # over the first, of another class
    ("duplicate", None, None, None, [35, 5, 45, 15], 1, 0.6),  # a quarter of the second, within it
    ("new", None, None, None, [85, 40, 99, 59], 0, 0.7),
    ("", [85, 0, 99, 20], 0, 0.3, None, None, None),  # nobody is sure of it
    ("kept", [85, 22, 99, 38], 1, 0.9, [85, 22, 99, 38], 1, 0.9),
]
EXPECTED = {"kept": 3, "moved": 1, "class changed": 1, "lost": 2, "duplicate": 2, "new": 1}


def by_hand(masks: bool) -> tuple[dict, dict]:
    first = [(box, number, score) for _, box, number, score, *_ in BY_HAND if box]
    second = [(box, number, score) for *_, box, number, score in BY_HAND if box]
    return tuple(
        detections([box for box, *_ in rows], [s for *_, s in rows], [n for _, n, _ in rows], masks)
        for rows in (first, second)
    )


@pytest.mark.parametrize("masks", [True, False])
def test_every_kind_by_hand(masks):
    first, second = by_hand(masks)
    truth = objects([0, 0, 20, 20], [30, 30, 50, 50], [85, 40, 99, 59], [60, 0, 80, 20], classes=[0, 0, 0, 0])
    truth += objects([60, 30, 80, 50], classes=[0])  # the second of the lost ones has the wrong class
    record = {
        "image_id": 7,
        "annotations": truth if masks else objects(*[t["bbox"] for t in truth], classes=[0] * 5, masks=False),
    }
    (task,) = tasks([first], [second], [record])
    losses = find_losses(task)
    total = losses.total
    assert dict(zip(KINDS, total[:, 0].tolist())) == EXPECTED
    assert losses.first == 7 and losses.second == 8 and losses.changed == {7: 7}
    # The first of the kept ones, the one that moved (before and, at an IoU of just 0.5, after) and one that is lost.
    right = {kind: tuple(counts) for kind, counts in zip(KINDS, total[:, 1:].tolist())}
    assert right["kept"] == (1, 1) and right["lost"] == (1, 0) and right["new"] == (0, 1)
    assert right["moved"] == (1, 1) and right["class changed"] == (0, 0) and right["duplicate"] == (0, 0)
    assert losses.objects == (5, 3, 3)
    assert losses.faint == (1, 0)
    assert losses.counts[0][LOST, 0] == losses.counts[1][LOST, 0] == 1
    assert task.class_name(0) == "car" and task.class_name(5) == "class 5"
    assert losses.worst(3) == [7]


def test_the_one_that_is_the_same_comes_first():
    """A neighbour that is near does not take what is the same, and what is left is matched where it fits best."""
    iou = np.array([[0.8, 0.9, 0.0], [0.3, 0.8, 0.6]])
    two = Detections(np.array([0, 0]), np.ones(2), np.zeros((2, 4)), SIZE)
    three = Detections(np.array([0, 0, 1]), np.ones(3), np.zeros((3, 4)), SIZE)
    changes = match(two, three, Overlap(iou, np.zeros_like(iou)))
    assert changes.partner.tolist() == [1, 2] and changes.first.tolist() == [KEPT, CLASS]
    assert changes.second.tolist() == [DUPLICATE, KEPT, CLASS]


boxes = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(5, 30)] * 2)
random_detections = st.lists(st.tuples(boxes, st.integers(0, 2), st.sampled_from([0.2, 0.5, 0.8])), max_size=12)


@settings(max_examples=60, deadline=None)
@given(random_detections, random_detections, st.booleans())
def test_the_counts_add_up(first, second, masks):
    outputs = [
        detections(
            [[left, top, left + width, top + height] for (left, top, width, height), *_ in rows],
            [score for *_, score in rows],
            [number for _, number, _ in rows],
            masks,
        )
        for rows in (first, second)
    ]
    (task,) = tasks(outputs[:1], outputs[1:], [{"image_id": 0}])
    losses, image = find_losses(task), task.examine(0)
    total = losses.total[:, 0]
    assert losses.first == sum(score >= 0.5 for *_, score in first) == total[list(OF_FIRST)].sum()
    assert losses.second == sum(score >= 0.5 for *_, score in second) == total[list(OF_SECOND)].sum()
    assert losses.changed[0] == total.sum() - total[KEPT] and losses.objects is None
    assert set(image.changes.first) <= set(OF_FIRST) and set(image.changes.second) <= set(OF_SECOND)
    partners = image.changes.partner[image.changes.partner >= 0]
    assert len(set(partners)) == len(partners) == total[[KEPT, MOVED, CLASS]].sum()
    for i, j in enumerate(image.changes.partner):
        assert j < 0 or image.changes.first[i] == image.changes.second[j]


def test_what_is_right_is_found_once_and_crowds_count_as_neither():
    truth = objects([0, 0, 20, 20], [40, 0, 99, 59], classes=[0, 0], crowd=[1])
    output = detections(
        [[0, 0, 20, 18], [0, 0, 20, 20], [50, 10, 70, 30], [0, 40, 9, 50]], [0.6, 0.9, 0.9, 0.9], [0] * 4
    )
    (task,) = tasks([output], [output], [{"image_id": 0, "annotations": truth}])
    image = task.examine(0)
    assert image.right[0].tolist() == [WRONG, RIGHT, IGNORED, WRONG]
    assert image.found[0].tolist() == [True, False] and find_losses(task).objects == (1, 1, 1)


def test_images_without_detections_or_objects():
    nothing = detections([], [], [])
    (task,) = tasks(
        [nothing, nothing],
        [nothing, detections([[0, 0, 9, 9]], [0.9], [1])],
        [{"image_id": i, "annotations": []} for i in range(2)],
    )
    losses = find_losses(task)
    assert losses.total[NEW].tolist() == [1, 0, 0] and losses.total[:, 0].sum() == 1
    assert losses.objects == (0, 0, 0) and losses.worst(5) == [1]


def test_boxes_are_matched_where_objects_have_no_mask():
    output = detections([[0, 0, 20, 20]], [0.9], [0])
    records = [{"image_id": 0, "annotations": objects([0, 0, 20, 20], classes=[0], masks=False)}]
    image = tasks([output], [output], records)[0].examine(0)
    assert isinstance(image.first.shapes, np.ndarray) and image.right[0].tolist() == [RIGHT]


def panoptic(columns: list[tuple[int, int, bool]], rows: int = 60) -> dict:
    """Segments from left to right: (how many columns of pixels, class, whether a thing)."""
    segments, info, left = torch.zeros(SIZE, dtype=torch.int32), [], 0
    for number, (width, kind, thing) in enumerate(columns, start=10):
        segments[:rows, left : left + width] = number
        info.append({"id": number, "category_id": kind, "isthing": thing})
        left += width
    return {"panoptic_seg": (segments, info)}


def test_segments(tmp_path):
    #        kept            moved            another class    lost             nothing
    first = [(20, 0, False), (20, 0, True), (20, 1, True), (20, 1, True), (20, 2, False)]
    second = [(20, 0, False), (30, 0, True), (10, 0, True), (20, 2, False), (20, 2, False)]
    second = panoptic(second)
    second["panoptic_seg"][0][:, 80:] = 0
    second["panoptic_seg"][1].pop()
    ids = np.full((*SIZE, 3), 0, np.uint8)
    ids[:, :20, 0], ids[:, 20:45, 0], ids[:, 60:75, 0] = 1, 2, 3
    Image.fromarray(ids).save(tmp_path / "truth.png")
    info = [
        {"id": 1, "category_id": 0, "isthing": False, "iscrowd": 0},
        {"id": 2, "category_id": 0, "isthing": True, "iscrowd": 0},
        {"id": 3, "category_id": 1, "isthing": True, "iscrowd": 1},
    ]
    record = {"image_id": 0, "pan_seg_file_name": str(tmp_path / "truth.png"), "segments_info": info}
    (task,) = tasks([panoptic(first)], [second], [record])
    image, losses = task.examine(0), find_losses(task)
    assert task.name == "panoptic segments" and task.class_name(1) == "car" and task.class_name(4) == "sand"
    #                                     20 of 30 pixels; a car of 10 in a dog; 20 of sand on 20 of a dog; nothing
    assert [KINDS[kind] for kind in image.changes.first] == ["kept", "moved", "class changed", "class changed", "lost"]
    assert [KINDS[kind] for kind in image.changes.second] == ["kept", "moved", "class changed", "class changed"]
    assert losses.total[:, 0].tolist() == [1, 1, 2, 1, 0, 0] and losses.first == 5 and losses.second == 4
    # Of the car's 25 columns the models have 20 and 25; the dog lies in a crowd, and the last has no truth.
    assert image.right[0].tolist() == [RIGHT, RIGHT, IGNORED, IGNORED, IGNORED]
    assert image.right[1].tolist() == [RIGHT, RIGHT, IGNORED, WRONG]
    assert losses.objects == (2, 2, 2)
    with pytest.raises(InputError, match="maps of segments of one image must have one size"):
        wrong = np.zeros((30, 30, 3), np.uint8)
        Image.fromarray(wrong).save(tmp_path / "truth.png")
        task.examine(0)


def test_a_part_of_a_segment_that_is_kept_is_a_duplicate():
    first, second = panoptic([(100, 0, True)]), panoptic([(80, 0, True), (20, 0, True)])
    (task,) = tasks([first], [second], [{"image_id": 0}])
    assert task.examine(0).changes.second.tolist() == [KEPT, DUPLICATE]


def test_classes_of_pixels(tmp_path):
    scores = torch.zeros(3, *SIZE)
    scores[0, :, :40], scores[2, :, 40:] = 1, 1
    second = scores.clone()
    second[1, :, 60:] = 2
    labels = np.full(SIZE, 255, np.uint8)
    labels[:, :40], labels[:, 40:80] = 0, 2
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {"image_id": 0, "sem_seg_file_name": str(tmp_path / "labels.png")}
    (task,) = tasks([{"sem_seg": scores}], [{"sem_seg": second}], [record])
    image = task.examine(0)
    assert [task.class_name(int(number)) for number in image.second.classes] == ["sky", "sea", "sand"]
    assert image.changes.first.tolist() == [KEPT, CLASS]
    assert image.changes.second.tolist() == [KEPT, CLASS, DUPLICATE]  # what is left of the sand lies in that of before
    assert image.right[0].tolist() == [RIGHT, RIGHT] and image.found[1].tolist() == [True, False]


def test_overlaps_of_masks_and_segments_agree():
    """Of the same shapes."""
    before, after = panoptic([(30, 0, True), (70, 1, True)]), panoptic([(50, 0, True), (50, 1, True)])
    recorders = [OutputRecorder() for _ in range(2)]
    for recorder, output in zip(recorders, (before, after)):
        recorder.process([{"image_id": 0}], [output])
    image = find_tasks(*recorders, [{"image_id": 0}], NAMES)[0].examine(0)
    segments = overlap(image.first, image.second)
    masks = overlap(
        *(
            Detections(
                np.arange(2), np.ones(2), np.array([[0, 0, width, 60], [width, 0, 100 - width, 60]], float), SIZE
            )
            for width in (30, 50)
        )
    )
    np.testing.assert_allclose(segments.iou, masks.iou)
    np.testing.assert_allclose(segments.share, masks.share)
    verdict, by_object = check(image.first, Truth(image.first, np.zeros(2, bool)))
    assert verdict.tolist() == [RIGHT, RIGHT] and by_object.all()
