import json

import pytest
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)

from hourglass import InputError
from hourglass.data.loading import build_loader
from hourglass.data.panoptic import register_ade20k_panoptic, register_panoptic

CATEGORIES = [
    {"id": 4, "name": "sky", "isthing": 0},
    {"id": 2, "name": "bird", "isthing": 1},
    {"id": 9, "name": "sea", "isthing": 0},
]


def segment(category: int, **more) -> dict:
    return {"id": category, "category_id": category, "area": 5, **more}


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
    """The folder of the data set "birds". The images are empty files: nothing reads them."""
    (tmp_path / "panoptic.json").write_text(json.dumps(CONTENT))
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    for folder in ("panoptic", "semantic"):
        (tmp_path / folder).mkdir()
        for name in ("7.png", "8.png"):
            (tmp_path / folder / name).touch()
    for name in ("seven.bmp", "8.jpg"):
        (tmp_path / name).touch()
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
    with pytest.raises(InputError, match="an instance of image 7 has category_id 4, which is no thing of"):
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
    (birds / "panoptic.json").write_text("{")
    with pytest.raises(InputError, match="panoptic JSON .* cannot be read .JSONDecodeError: "):
        load("birds")


def test_ade20k(tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    folder.mkdir()
    content = {**CONTENT, "images": [{**CONTENT["images"][0], "file_name": "seven.jpg"}]}
    (folder / "ade20k_panoptic_val.json").write_text(json.dumps(content))
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
