import json

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from hourglass import InputError
from hourglass.data.panoptic import PanopticMetadata, segment_ids
from hourglass.prediction.names import Names
from hourglass.prediction.results import JsonList, Results
from tests.predictions import NAMES, make_instances


def about(number: int) -> dict:
    return {"id": number, "file_name": f"{number}.jpg", "height": 60, "width": 80}


def test_instances_are_results_that_coco_reads(tmp_path):
    results = Results(tmp_path / "out", NAMES)
    results.add(about(1), {"instances": make_instances([[10, 20, 30, 50], [0, 0, 4, 4]], [1, 0], [0.75, 0.01])})
    results.add(about(2), {"instances": make_instances([], [])})
    masks_alone = make_instances([[3, 5, 9, 8]], [1])
    masks_alone.pred_boxes = Boxes(torch.zeros(1, 4))
    results.add(about(3), {"instances": masks_alone})
    assert results.close() == ["predictions.json", "images.json"]
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    # All of them, whatever their score, by the data set's ids.
    assert [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in entries] == [
        (1, 5, [10, 20, 20, 30]),
        (1, 1, [0, 0, 4, 4]),
        (3, 5, [3, 5, 6, 3]),
    ]
    assert entries[0]["score"] == 0.75
    assert rle.decode(entries[0]["segmentation"])[20:50, 10:30].all() and rle.area(entries[0]["segmentation"]) == 600
    truth = COCO(str(tmp_path / "out" / "images.json"))
    assert len(truth.loadRes(str(tmp_path / "out" / "predictions.json")).anns) == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images.json", "predictions.json"}


def test_panoptic_segments_and_classes_of_pixels(tmp_path):
    segments = torch.zeros(60, 80, dtype=torch.int32)
    segments[:30], segments[40:, :20] = 1, 70000
    info = [{"id": 1, "isthing": False, "category_id": 2}, {"id": 70000, "isthing": True, "category_id": 1}]
    scores = torch.zeros(4, 60, 80)
    scores[2, :30], scores[3, 30:] = 1, 1
    results = Results(tmp_path, NAMES)
    results.add(about(4), {"panoptic_seg": (segments, info), "sem_seg": scores})
    assert results.close() == ["panoptic.json", "semantic.json", "images.json"]
    (entry,) = json.loads((tmp_path / "panoptic.json").read_text())
    assert entry["segments_info"] == [
        {"id": 1, "category_id": 7, "area": 2400},
        {"id": 70000, "category_id": 5, "area": 400},
    ]
    colours = np.asarray(Image.open(tmp_path / "panoptic" / entry["file_name"]))
    assert np.array_equal(segment_ids(colours), segments.numpy())
    sky, grass = json.loads((tmp_path / "semantic.json").read_text())
    assert (sky["category_id"], grass["category_id"]) == (7, 9) and rle.decode(sky["segmentation"])[:30].all()
    assert rle.area(sky["segmentation"]) == rle.area(grass["segmentation"]) == 2400
    categories = json.loads((tmp_path / "images.json").read_text())["categories"]
    assert categories[0] == {"id": 1, "name": "disc", "isthing": 1} and [category["id"] for category in categories] == [
        1,
        5,
        7,
        9,
    ]


def test_a_list_is_written_whole_or_not_at_all(tmp_path):
    for keep in (True, False):
        items = JsonList(tmp_path / f"{keep}.json")
        items.add({"a": 1})
        items.add(None)
        assert not (tmp_path / f"{keep}.json").exists()
        items.close(complete=keep)
    assert [path.name for path in tmp_path.iterdir()] == ["True.json"]
    assert json.loads((tmp_path / "True.json").read_text()) == [{"a": 1}, None]
    JsonList(tmp_path / "none.json").close()
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_names_as_far_as_they_are_known(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]}))
    read = Names.from_metadata(Metadata(name="registered", json_file=str(path)))  # not loaded yet
    assert read.known and read.name(1) == "dog" and read.category_id(1) == 7 and read.category_id(0) == 3
    names = Names.from_metadata(Metadata(name="told", thing_classes=["a"], thing_dataset_id_to_contiguous_id={9: 0}))
    assert names.name(0) == "a" and names.category_id(0) == 9 and names.name(4) == "class 4"
    told = {"name": "registered with names", "json_file": str(path)}
    ids = Names.from_metadata(Metadata(**told, thing_classes=["cat", "dog"]))
    assert [ids.category_id(number) for number in (0, 1)] == [3, 7]
    others = Names.from_metadata(Metadata(**told, thing_classes=["dog", "cat"]))  # whose ids are not known
    assert others.name(0) == "dog" and others.category_id(0) == 1
    path.write_text('{"categories": [{"id": 7}]}')
    with pytest.raises(InputError, match="instances.json has no categories that can be read .KeyError: 'name'"):
        Names.from_metadata(Metadata(name="damaged", json_file=str(path)))
    gone = Names.from_metadata(PanopticMetadata(name="gone", panoptic_json=str(tmp_path / "gone.json")))
    for unknown in (
        gone,
        Names.from_metadata(Metadata(name="nothing")),
        Names.from_metadata(Metadata(name="x", json_file="gone.json")),
    ):
        assert not unknown.known and unknown.name(2) == "class 2" and unknown.category_id(2) == 3


@pytest.mark.parametrize("complete", [True, False])
def test_nothing_found_leaves_no_file(tmp_path, complete):
    results = Results(tmp_path, NAMES)
    if complete:
        results.add(about(1), {})
    assert results.close(complete) == (["images.json"] if complete else [])
    assert [path.name for path in tmp_path.iterdir()] == (["images.json"] if complete else [])
