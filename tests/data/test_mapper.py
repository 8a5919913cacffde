import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from hourglass import InputError
from hourglass.data import PanopticMapper

SEGMENTS = [
    {"id": 7, "category_id": 2, "isthing": True, "iscrowd": 0},
    {"id": 300, "category_id": 4, "isthing": False, "iscrowd": 0},
    {"id": 70000, "category_id": 1, "isthing": True, "iscrowd": 1},
]


@pytest.fixture
def record(tmp_path):
    """An image of 4 x 6: two columns of each segment, the last row without a label."""
    ids = np.repeat([7, 300, 70000], 2)[None].repeat(4, 0)
    ids[3] = 0
    return write(tmp_path, ids, SEGMENTS)


def write(folder, ids, segments):
    Image.fromarray(np.arange(ids.size * 3, dtype=np.uint8).reshape(*ids.shape, 3)).save(folder / "image.png")
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(folder / "ids.png")
    return {
        "file_name": str(folder / "image.png"),
        "pan_seg_file_name": str(folder / "ids.png"),
        "segments_info": segments,
        "image_id": 5,
    }


def test_things_and_stuff_but_no_crowd(record):
    before = dict(record)
    entry = PanopticMapper([])(record)
    assert record == before
    assert entry["image"].shape == (3, 4, 6) and entry["image"].dtype == torch.uint8
    assert (entry["image_id"], entry["height"], entry["width"]) == (5, 4, 6)
    instances = entry["instances"]
    assert instances.gt_classes.tolist() == [2, 4]
    assert instances.gt_masks.tensor.int().tolist() == [
        [[1, 1, 0, 0, 0, 0]] * 3 + [[0] * 6],
        [[0, 0, 1, 1, 0, 0]] * 3 + [[0] * 6],
    ]


def test_classes_of_pixels(record):
    assert "sem_seg" not in PanopticMapper([])(record)
    sem_seg = PanopticMapper([], semantic=True, ignore_label=99)(record)["sem_seg"]
    assert sem_seg.dtype == torch.int64
    # Neither the crowd nor the row without a label has a class.
    assert sem_seg.tolist() == [[2, 2, 4, 4, 99, 99]] * 3 + [[99] * 6]


def test_things_alone_with_their_boxes(record):
    entry = PanopticMapper([], stuff=False, semantic=True)(record)
    instances = entry["instances"]
    assert instances.gt_classes.tolist() == [2] and len(instances.gt_masks) == 1
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 2, 3]]
    # The semantic classes have the stuff all the same.
    assert 4 in entry["sem_seg"]


def test_image_format(record):
    rgb, bgr = (PanopticMapper([], image_format=name)(record)["image"] for name in ("RGB", "BGR"))
    assert torch.equal(rgb, bgr.flip(0))


def test_segments_follow_the_image(record):
    augmentations = [T.RandomFlip(prob=1.0), T.Resize((8, 12)), T.CropTransform(0, 0, 6, 8)]
    instances = PanopticMapper(augmentations)(record)["instances"]
    # Only half of the stuff and all of the crowd are left.
    assert instances.gt_classes.tolist() == [4]
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[:6, 4:] = True
    assert torch.equal(instances.gt_masks.tensor[0], expected)


def test_padding_is_no_segment(record):
    instances = PanopticMapper([T.FixedSizeCrop((8, 8))])(record)["instances"]
    assert instances.image_size == (8, 8)
    assert instances.gt_masks.tensor.sum((1, 2)).tolist() == [6, 6]


def test_nothing_annotated(tmp_path):
    instances = PanopticMapper([])(write(tmp_path, np.zeros((4, 6), int), []))["instances"]
    assert len(instances) == 0
    assert instances.gt_masks.tensor.shape == (0, 4, 6)


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_png_that_cannot_be_read_is_refused(record, content, tmp_path):
    path = tmp_path / "ids.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"panoptic PNG .*ids.png (is missing|cannot be read)") as refusal:
        PanopticMapper([])(record)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "segments, message",
    [
        (SEGMENTS[:2], r"has a segment 70000 that its annotation does not list among \[7, 300\]"),
        (
            [*SEGMENTS, {"id": 9, "category_id": 1, "isthing": True}],
            r"has no pixel of segment 9 that its annotation lists, only of \[0, 7",
        ),
    ],
)
def test_other_segments_are_refused(record, segments, message):
    with pytest.raises(InputError, match=message):
        PanopticMapper([])({**record, "segments_info": segments})


def test_stuff_may_be_hidden_by_things(record):
    hidden = {"id": 9, "category_id": 3, "isthing": False, "iscrowd": 0}
    instances = PanopticMapper([])({**record, "segments_info": [*SEGMENTS, hidden]})["instances"]
    assert instances.gt_classes.tolist() == [2, 4]


def test_a_png_of_another_size_is_refused(record, tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "ids.png")
    with pytest.raises(InputError, match=r"ids.png is 2 x 3 pixels, its image .*image.png 4 x 6"):
        PanopticMapper([])(record)


def test_a_record_that_is_not_panoptic_is_refused(record):
    del record["pan_seg_file_name"]
    with pytest.raises(InputError, match="has no pan_seg_file_name: PanopticMapper needs a panoptic data set"):
        PanopticMapper([])(record)
