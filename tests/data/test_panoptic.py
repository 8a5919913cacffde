import json

import numpy as np
import pytest
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from PIL import Image

from hourglass import InputError
from hourglass.data.loading import build_loader
from hourglass.data.panoptic import read_panoptic_ids, register_ade20k_panoptic, register_panoptic

CATEGORIES = [
    {"id": 4, "name": "sky", "isthing": 0},
    {"id": 2, "name": "bird", "isthing": 1},
    {"id": 9, "name": "sea", "isthing": 0},
]


def segment(category: int, **extra) -> dict:
    return {"id": category, "category_id": category, "area": 5, **extra}


CONTENT = {
    "images": [{"id": 7, "file_name": "seven.bmp", "height": 3, "width": 5}],
    "annotations": [
        {"image_id": 7, "file_name": "7.png", "segments_info": [segment(4), segment(2, iscrowd=1)]},
        {"image_id": 8, "file_name": "8.png", "segments_info": []},
    ],
    "categories": CATEGORIES,
}
INSTANCES = {
    "images": [{"id": 7, "file_name": "seven.bmp", "height": 3, "width": 5}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0}],
    "categories": [{"id": 2, "name": "bird"}],
}


@pytest.fixture
def birds(tmp_path):
    """The folder of the data set "birds", whose images are black."""
    (tmp_path / "panoptic.json").write_text(json.dumps(CONTENT))
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    for folder in ("panoptic", "semantic"):
        (tmp_path / folder).mkdir()
        for name in ("7.png", "8.png"):
            Image.new("RGB" if folder == "panoptic" else "L", (5, 3)).save(tmp_path / folder / name)
    for name in ("seven.bmp", "8.jpg"):
        Image.new("RGB", (5, 3)).save(tmp_path / name)
    register_panoptic(
        "birds",
        image_root=tmp_path,
        panoptic_json=tmp_path / "panoptic.json",
        panoptic_root=tmp_path / "panoptic",
        instances_json=tmp_path / "instances.json",
        sem_seg_root=tmp_path / "semantic",
    )
    yield tmp_path
    remove("birds")


def remove(name: str) -> None:
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_names_and_ids_come_from_the_json(birds):
    metadata = MetadataCatalog.get("birds")
    assert metadata.thing_classes == ["bird"] and metadata.stuff_classes == ["bird", "sky", "sea"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0}
    assert metadata.stuff_dataset_id_to_contiguous_id == {2: 0, 4: 1, 9: 2}
    assert metadata.sem_seg_root == str(birds / "semantic") and metadata.json_file == str(birds / "instances.json")


def test_records(birds):
    seven, eight = DatasetCatalog.get("birds")
    assert seven["file_name"] == str(birds / "seven.bmp") and eight["file_name"] == str(birds / "8.jpg")
    assert (seven["image_id"], seven["height"], seven["width"]) == (7, 3, 5)
    assert seven["pan_seg_file_name"] == str(birds / "panoptic" / "7.png")
    assert seven["sem_seg_file_name"] == str(birds / "semantic" / "7.png")
    assert seven["segments_info"] == [
        {"id": 4, "category_id": 1, "area": 5, "iscrowd": 0, "isthing": False},
        {"id": 2, "category_id": 0, "area": 5, "iscrowd": 1, "isthing": True},
    ]
    assert seven["annotations"][0]["category_id"] == 0
    assert eight["segments_info"] == eight["annotations"] == []
    assert DatasetCatalog.get("birds") == [seven, eight]


def test_things_that_do_not_come_first_keep_every_name(birds):
    content = {**CONTENT, "categories": [{**category, "isthing": int(category["id"] == 4)} for category in CATEGORIES]}
    (birds / "panoptic.json").write_text(json.dumps(content))
    metadata = MetadataCatalog.get("birds")
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 1}
    assert metadata.thing_classes == metadata.stuff_classes == ["bird", "sky", "sea"]


def test_instances_of_another_category_are_refused(birds):
    (birds / "instances.json").write_text(json.dumps(INSTANCES).replace('"category_id": 2', '"category_id": 4'))
    with pytest.raises(InputError, match="an instance of image 7 has category_id 4, which is not a thing of"):
        DatasetCatalog.get("birds")


def load(name: str, **arguments):
    dataset = L(get_detection_dataset_dicts)(names=name, filter_empty=False)
    mapper = L(DatasetMapper)(is_train=False, augmentations=[], image_format="RGB")
    return build_loader(L(build_detection_test_loader)(dataset=dataset, mapper=mapper, num_workers=0), **arguments)


@pytest.mark.parametrize(
    "path, message",
    [
        ("panoptic.json", "panoptic.json is missing; .*instances.json and .*panoptic.json and .* are expected"),
        ("panoptic/8.png", "1 of the 2 panoptic PNGs of data set 'birds' are missing, such as .*8.png"),
        ("semantic/7.png", "1 of the 2 semantic PNGs of data set 'birds' are missing"),
        ("8.jpg", "1 of the 2 images of data set 'birds' are missing"),
    ],
)
def test_the_loader_says_what_is_missing(birds, path, message):
    assert len(load("birds")[1]) == 2
    (birds / path).unlink()
    with pytest.raises(InputError, match=message) as refused:
        load("birds")
    assert "\n" not in str(refused.value)


def test_only_the_images_that_are_run_have_to_be_there(birds):
    (birds / "panoptic" / "8.png").unlink()
    assert len(load("birds", max_images=1)[1]) == 1


def test_what_detectron2_cannot_load_is_refused(birds):
    (birds / "instances.json").write_text("{")
    with pytest.raises(InputError, match="instances JSON .*instances.json cannot be read .JSONDecodeError: "):
        load("birds")
    (birds / "instances.json").write_text(json.dumps(INSTANCES))
    (birds / "panoptic.json").write_text("{")
    with pytest.raises(InputError, match="panoptic JSON .* cannot be read .JSONDecodeError: "):
        load("birds")


def test_ade20k(tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    folder.mkdir()
    content = {**CONTENT, "images": [{**CONTENT["images"][0], "file_name": "seven.jpg"}]}
    (folder / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    for name in {"ade20k_panoptic_train", "ade20k_panoptic_val"} & set(DatasetCatalog.list()):
        remove(name)  # a config that another test loaded has registered it
    register_ade20k_panoptic(tmp_path)
    register_ade20k_panoptic(tmp_path)  # what is there stays
    try:
        record = DatasetCatalog.get("ade20k_panoptic_val")[0]
        assert record["file_name"] == str(folder / "images" / "validation" / "seven.jpg")
        assert record["pan_seg_file_name"] == str(folder / "ade20k_panoptic_val" / "7.png")
        assert record["sem_seg_file_name"] == str(folder / "annotations_detectron2" / "validation" / "7.png")
        assert "annotations" not in record
    finally:
        remove("ade20k_panoptic_train")
        remove("ade20k_panoptic_val")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": None}, "segment None of image 7 must have a whole number from 1 to 16777215"),
        ({"id": "4"}, "segment '4' of image 7 must have a whole number"),
        ({"id": 0}, "segment 0 of image 7 must have a whole number"),
        ({"id": 2}, "segment 2 of image 7 occurs more than once"),
        ({"category_id": 5}, r"segment 4 of image 7 has category_id 5, which is none of \[2, 4, 9\]"),
        ({"category_id": "4"}, "segment 4 of image 7 has category_id '4', which is none of"),
        ({"iscrowd": 2}, "segment 4 of image 7 has iscrowd 2, which must be 0 or 1"),
    ],
)
def test_wrong_segments_are_refused(birds, change, message):
    content = json.loads(json.dumps(CONTENT))
    content["annotations"][0]["segments_info"][0].update(change)
    (birds / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"panoptic.json: {message}"):
        load("birds")


@pytest.mark.parametrize("key", ["id", "category_id"])
def test_segments_without_an_id_or_a_category_are_refused(birds, key):
    content = json.loads(json.dumps(CONTENT))
    del content["annotations"][0]["segments_info"][1][key]
    (birds / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"panoptic.json: a segment of image 7 has no '{key}'"):
        load("birds")


@pytest.mark.parametrize("area", [None, -1, 0, "much"])
def test_what_can_be_counted_is_not_asked_for(birds, area, caplog):
    content = json.loads(json.dumps(CONTENT))
    for segment_info in content["annotations"][0]["segments_info"]:
        segment_info["area"] = area
        if area is None:
            del segment_info["area"]
    (birds / "panoptic.json").write_text(json.dumps(content))
    records = load("birds")[1]
    assert [segment_info["iscrowd"] for segment_info in records[0]["segments_info"]] == [0, 1]
    (line,) = caplog.messages
    assert "panoptic.json: 1 of the 2 segments have no iscrowd, such as segment 4 of image 7: 0 is assumed" in line


@pytest.mark.parametrize(
    "key, message", [("images", "image"), ("annotations", "annotated image"), ("categories", "category")]
)
def test_what_is_there_twice_is_refused(birds, key, message):
    content = json.loads(json.dumps(CONTENT))
    content[key].append(content[key][0])
    (birds / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"panoptic.json: 1 {message} ids occur more than once, such as"):
        load("birds")


@pytest.mark.parametrize("folder, kind", [("panoptic", "panoptic PNG"), ("semantic", "semantic PNG")])
def test_a_png_of_another_size_is_refused_when_opened(birds, folder, kind):
    Image.new("RGB" if folder == "panoptic" else "L", (3, 5)).save(birds / folder / "8.png")
    with pytest.raises(InputError, match=f"{kind} .*8.png is 5 x 3 pixels, its image .*8.jpg 3 x 5"):
        load("birds")


def test_a_panoptic_png_without_colours_is_refused_when_opened(birds):
    Image.new("L", (5, 3)).save(birds / "panoptic" / "7.png")
    with pytest.raises(InputError, match="panoptic PNG .*7.png is of Pillow's mode 'L': it must be 8 bit RGB"):
        load("birds")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_ids_are_read_as_colours_code_them(mode, tmp_path):
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colours).convert(mode).save(tmp_path / "ids.png")
    assert read_panoptic_ids(tmp_path / "ids.png").tolist() == ids.tolist()


def test_ids_are_not_read_of_greys(tmp_path):
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "ids.png")
    with pytest.raises(InputError, match=r"panoptic PNG .*ids.png is \(2, 3\) uint8: it must be 8 bit RGB"):
        read_panoptic_ids(tmp_path / "ids.png")
