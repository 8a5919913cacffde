"""Files of instances: what is wrong is refused with the first offender, what is beyond doubt mended for everybody."""

import copy
import json

import numpy as np
import pytest
from detectron2.data.datasets.coco import load_coco_json
from detectron2.utils.file_io import PathManager
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hourglass import InputError
from hourglass.data import annotations
from hourglass.data.annotations import open_instances

SQUARE = [10, 20, 30, 20, 30, 60, 10, 60]  # x 10 to 30, y 20 to 60 of an image of 80 x 100


def encode(height: int = 80, width: int = 100, counts: type = str) -> dict:
    """SQUARE as RLE."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[20:60, 10:30] = 1
    if counts is str:
        coded = rle.encode(mask)
        return {"size": coded["size"], "counts": coded["counts"].decode()}
    flat = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [height, width], "counts": np.diff([0, *edges, len(flat)]).tolist()}


def annotation(number: int, **changes) -> dict:
    entry = {
        "id": number,
        "image_id": 3,
        "category_id": 7,
        "bbox": [10, 20, 20, 40],
        "area": 800,
        "iscrowd": 0,
        "segmentation": [SQUARE],
    }
    entry.update(changes)
    return {key: value for key, value in entry.items() if value is not ...}


def content(*annotations: dict) -> dict:
    return {
        "images": [
            {"id": 3, "file_name": "three.png", "height": 80, "width": 100},
            {"id": 4, "file_name": "four.png", "height": 80, "width": 100},
        ],
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "cell"}, {"id": 9, "name": "ground"}],
    }


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "instances.json"

    def write(document) -> str:
        path.write_text(json.dumps(document))
        return str(path)

    return write


def mended(path: str, caplog) -> tuple[list[dict], str]:
    """The annotations as others read them, and the one line that says what was mended."""
    open_instances(path)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hourglass.data.annotations"]
    with open(PathManager.get_local_path(path)) as file:
        return json.load(file)["annotations"], line


def test_a_file_that_is_right_stays_what_it_is(write, caplog):
    crowd = annotation(2, segmentation=encode(counts=list), iscrowd=1)
    path = write(content(annotation(1), crowd, annotation(5, segmentation=encode(), category_id=9)))
    instances = open_instances(path)
    assert instances.image_ids == {3, 4} and (instances.categories, instances.annotations) == (2, 3)
    assert instances.without_mask == (0, None) and instances.without_keypoints == (3, 1)
    assert not caplog.records and PathManager.get_local_path(path) == path


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"category_id": "7"},
            "annotations of 2 whose category_id is not a whole number, such as annotation 6 of image 3, which has '7'",
        ),
        ({"category_id": 8}, r"whose category_id is none of \[7, 9\], such as annotation 6 of image 3, which has 8"),
        (
            {"category_id": ...},
            "whose category_id is not a whole number, such as annotation 6 of image 3, which has None",
        ),
        ({"category_id": 7.5}, "whose category_id is not a whole number"),
        (
            {"bbox": [10, float("nan"), 20, 40]},
            "whose bbox is not .* such as annotation 6 of image 3, which has .10, nan, 20",
        ),
        ({"bbox": [10, 20, float("inf"), 40]}, "whose bbox is not .* of finite numbers"),
        ({"bbox": [10, 20, -20, 40]}, "whose bbox is not .* none of the sides under 0"),
        ({"bbox": [10, 20, 20]}, "whose bbox is not"),
        ({"bbox": [10, 20, 20, 40, 45]}, "whose bbox is not"),
        ({"bbox": ["10", 20, 20, 40]}, "whose bbox is not"),
        ({"bbox": {"x": 10}}, "whose bbox is not"),
        ({"bbox": ..., "segmentation": ...}, "without a bbox and a mask, such as annotation 6 of image 3"),
        ({"area": -1}, "whose area is not a number of at least 0, such as annotation 6 of image 3, which has -1"),
        ({"area": float("nan")}, "whose area is not a number of at least 0"),
        ({"area": "800"}, "whose area is not a number of at least 0"),
        ({"iscrowd": 2}, "whose iscrowd is neither 0 nor 1"),
        ({"ignore": 1}, 'with "ignore", which Detectron2 does not take'),
        ({"segmentation": encode(100, 80)}, r"whose RLE has the size .width, height., which must be .height, width."),
        (
            {"segmentation": encode(80, 90)},
            r"whose RLE has another size than their image \(\[80, 90\], not \[80, 100\]\)",
        ),
        ({"segmentation": {"size": [80, 100], "counts": [7, 9]}}, "whose RLE does not count all pixels of its size"),
        (
            {"segmentation": {"size": [80, 100], "counts": encode()["counts"][:-1]}},
            "whose RLE does not count all pixels",
        ),
        ({"segmentation": {"size": [80, 100]}}, "whose RLE is not"),
        ({"segmentation": {"size": [80], "counts": [1]}}, "whose RLE is not"),
        ({"segmentation": "mask.png"}, "whose segmentation is neither RLE nor a list of polygons"),
        ({"segmentation": [[*SQUARE, 4]]}, "whose segmentation is neither RLE nor a list of polygons"),
        (
            {"segmentation": [[*SQUARE, 4, None]]},
            "with polygons of other values than finite numbers, such as annotation 6",
        ),
        ({"segmentation": [[*SQUARE, 4, float("nan")]]}, "with polygons of other values than finite numbers"),
        ({"segmentation": [[*SQUARE, 4, "5"]]}, "with polygons of other values than finite numbers"),
        ({"image_id": ...}, "whose image_id is neither a whole number nor text"),
        (
            {"image_id": "3"},
            "1 of the 2 annotations have an image_id that none of its images has, such as annotation 6 with '3'",
        ),
        ({"id": 1}, "1 annotation ids occur more than once, such as 1"),
    ],
)
def test_wrong_annotations_are_refused_with_the_first(write, changes, message):
    path = write(content(annotation(1), annotation(6, **changes)))
    with pytest.raises(InputError, match=message) as refused:
        open_instances(path)
    assert path in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda doc: doc.pop("annotations"), r"has no list 'annotations', it has \['categories', 'images'\]"),
        (lambda doc: doc.pop("categories"), "has no list 'categories'"),
        (lambda doc: doc.update(images={}), "has no list 'images'"),
        (lambda doc: doc["images"].append(dict(doc["images"][0])), "1 image ids occur more than once, such as 3"),
        (
            lambda doc: doc["images"][1].update(id="4"),
            "1 of the 2 images have ids that are not whole numbers, such as '4' of four",
        ),
        (lambda doc: doc["images"][1].update(id=None), "have ids that are not whole numbers, such as None of four.png"),
        (lambda doc: doc["images"][1].update(id=4.5), "have ids that are not whole numbers, such as 4.5"),
        (lambda doc: doc["images"][1].pop("height"), "image 4 has height None and width 100"),
        (lambda doc: doc["images"][1].update(width=0), "image 4 has height 80 and width 0"),
        (lambda doc: doc["images"][1].pop("file_name"), "image 1 of its list has no file_name"),
        (
            lambda doc: doc["categories"][1].update(id="9"),
            "1 of the 2 categories have ids that are not whole numbers, such as '9'",
        ),
        (lambda doc: doc["categories"][1].update(id=7), "1 category ids occur more than once, such as 7"),
        (lambda doc: doc["categories"][1].pop("name"), "category 1 of its list has no name"),
        (lambda doc: doc["annotations"].append(5), "annotation 1 of its list is not an object, got 5"),
    ],
)
def test_other_documents_are_refused(write, change, message):
    document = content(annotation(1))
    change(document)
    with pytest.raises(InputError, match=message):
        open_instances(write(document))


def test_no_json_is_refused(tmp_path, write):
    with pytest.raises(InputError, match="none.json cannot be read .FileNotFoundError"):
        open_instances(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="has no list 'images', it has list"):
        open_instances(write([]))
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read .JSONDecodeError"):
        open_instances(str(tmp_path / "instances.json"))


@pytest.mark.parametrize(
    "changes, key, value, line",
    [
        (
            {"iscrowd": ...},
            "iscrowd",
            0,
            "1 of the 2 annotations have no iscrowd, such as annotation 6 of image 3: 0 is assumed",
        ),
        ({"iscrowd": None}, "iscrowd", 0, "have no iscrowd"),
        (
            {"area": ...},
            "area",
            800,
            "annotations have no area, such as annotation 6 of image 3: their masks' or else boxes'",
        ),
        ({"area": None}, "area", 800, "annotations have no area"),
        ({"area": None, "bbox": [0, 0, 50, 70]}, "area", 800, "annotations have no area"),
        ({"area": None, "segmentation": encode()}, "area", 800, "annotations have no area"),
        ({"area": None, "segmentation": encode(counts=list)}, "area", 800, "annotations have no area"),
        ({"area": None, "segmentation": ..., "bbox": [10, 20, 20, 41]}, "area", 820, "annotations have no area"),
        (
            {"bbox": ...},
            "bbox",
            [10, 20, 20, 40],
            "have no bbox, such as annotation 6 of image 3: their masks' is used",
        ),
        ({"bbox": []}, "bbox", [10, 20, 20, 40], "have no bbox"),
        ({"bbox": None, "segmentation": encode()}, "bbox", [10, 20, 20, 40], "have no bbox"),
        ({"bbox": ..., "segmentation": encode(counts=list)}, "bbox", [10, 20, 20, 40], "have no bbox"),
        (
            {"segmentation": SQUARE},
            "segmentation",
            [SQUARE],
            "have a polygon that is not in a list, such as annotation 6",
        ),
        (
            {"segmentation": [[1, 2, 3, 4], SQUARE]},
            "segmentation",
            [SQUARE],
            "polygons of under 3 points beside others",
        ),
        ({"id": 0}, "id", 2, "annotations have ids that are not whole numbers over 0, such as 0: all are renumbered"),
        ({"id": "a6"}, "id", 2, "such as 'a6': all are renumbered"),
        ({"id": ...}, "id", 2, "such as None: all are renumbered"),
    ],
)
def test_what_is_beyond_doubt_is_mended_and_said(write, caplog, changes, key, value, line):
    first = annotation(1)
    (unchanged, changed), warnings = mended(write(content(first, annotation(6, **changes))), caplog)
    assert unchanged == first and changed[key] == value and line in warnings
    # Nothing else is changed.
    expected = annotation(6, **changes)
    assert {name: value for name, value in changed.items() if name != key} == {
        name: value for name, value in expected.items() if name != key
    }


@pytest.mark.parametrize("mask", [..., None, [], {}, [[1, 2, 3, 4]], [[]]])
def test_objects_without_a_mask_keep_their_boxes(write, mask, caplog):
    path = write(content(annotation(1), annotation(6, segmentation=mask)))
    instances = open_instances(path)
    assert instances.without_mask == (1, 6)
    caplog.clear()
    # Detectron2's loader drops objects whose polygons are too short.
    if isinstance(mask, list) and mask:
        assert [len(record["annotations"]) for record in load_coco_json(path, "")] == [2, 0]


def test_annotations_of_no_image_are_left_out_with_a_word(write, caplog):
    path = write(content(annotation(1), annotation(6, image_id=99)))
    open_instances(path)
    assert (
        "1 of the 2 annotations have an image_id that none of its images has, such as annotation 6 with 99"
        in caplog.text
    )
    with pytest.raises(InputError, match="2 of the 2 annotations have an image_id that none of its images has"):
        open_instances(write(content(annotation(1, image_id=98), annotation(6, image_id=99))))


def test_images_may_be_named_by_text(write):
    document = content(annotation(1, image_id="three"))
    document["images"][0]["id"], document["images"][1]["id"] = "three", "four"
    assert open_instances(write(document)).image_ids == {"three", "four"}


def test_boxes_that_their_masks_show_to_be_corners_are_refused(write):
    path = write(content(*(annotation(i, bbox=[10, 20, 30, 60]) for i in (4, 5)), annotation(6)))
    with pytest.raises(
        InputError, match=r"2 of the 3 annotations have boxes that are x0 y0 x1 y1 \(XYXY\) .*annotation 4"
    ):
        open_instances(path)
    # One of many may be as it is.
    open_instances(write(content(annotation(4, bbox=[10, 20, 30, 60]), annotation(5), annotation(6))))


def test_most_boxes_leaving_their_images_is_said(write, caplog):
    boxes = [annotation(i, bbox=[60, 30, 90, 70], segmentation=...) for i in (1, 2)]
    open_instances(write(content(*boxes, annotation(3))))
    assert "2 of the 3 boxes leave their images: are they x0 y0 x1 y1 (XYXY)?" in caplog.text
    caplog.clear()
    open_instances(write(content(boxes[0], annotation(2), annotation(3))))
    assert not caplog.records


def test_a_copy_is_mended_for_the_loader_and_the_evaluation(write):
    """The file itself stays, and a mend of it is noticed."""
    wrong = content(annotation(1, iscrowd=..., area=...), annotation(2, image_id=4, iscrowd=..., area=None))
    path = write(wrong)
    open_instances(path)
    with open(path) as file:
        assert json.load(file) == wrong
    assert [record["annotations"][0]["iscrowd"] for record in load_coco_json(path, "")] == [0, 0]
    with PathManager.open(path) as file:
        assert [entry["area"] for entry in json.load(file)["annotations"]] == [800, 800]
    assert PathManager.exists(path) and PathManager.isfile(path)

    right = content(annotation(1))
    open_instances(write(right))
    assert PathManager.get_local_path(path) == path
    with PathManager.open(path) as file:
        assert json.load(file) == right


def evaluate(path: str, results: list[dict], task: str) -> float:
    truth = COCO(PathManager.get_local_path(path))
    evaluation = COCOeval(truth, truth.loadRes(results), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(
    "changes", [{"id": 0}, {"iscrowd": ...}, {"area": None}, {"bbox": None}, {"segmentation": SQUARE}, {"id": "b"}]
)
def test_right_predictions_score_fully(write, task, changes):
    path = write(content(annotation(1, image_id=4), annotation(6, **changes)))
    open_instances(path)
    results = [
        {"image_id": id, "category_id": 7, "bbox": [10, 20, 20, 40], "segmentation": encode(), "score": 0.9}
        for id in (3, 4)
    ]
    if task == "bbox":
        for result in results:
            del result["segmentation"]
    assert evaluate(path, copy.deepcopy(results), task) == pytest.approx(1)


def test_a_mend_of_many_annotations_is_one_line(write, caplog, monkeypatch):
    monkeypatch.setattr(annotations, "BLOCK", 2)
    path = write(content(*(annotation(i, area=...) for i in range(1, 6))))
    everything, line = mended(path, caplog)
    assert [entry["area"] for entry in everything] == [800] * 5
    assert "5 of the 5 annotations have no area, such as" in line


def test_pixels_of_runs_are_counted():
    """Of masks of all shapes, empty and full ones among them; of text that is cut or none, -1."""
    random = np.random.RandomState(0)
    masks = [np.asfortranarray(random.rand(*random.randint(1, 90, 2)) < random.rand() ** 2) for _ in range(200)]
    masks += [np.zeros((50, 70), bool, order="F"), np.ones((50, 70), bool, order="F")]
    big = np.zeros((3000, 2000), bool, order="F")
    big[5:2000, 1000] = True
    coded = [rle.encode(mask.astype(np.uint8)) for mask in [*masks, big]]
    texts = [{"counts": mask["counts"].decode()} for mask in coded]
    sizes = [mask.size for mask in [*masks, big]]
    assert annotations.count_pixels(texts).tolist() == sizes
    mixed = [*texts[:2], {"counts": [3, 4, 5]}, {"counts": texts[-1]["counts"][:-1]}, {"counts": ""}, {"counts": "é\n"}]
    counted = annotations.count_pixels([*mixed, texts[2]]).tolist()
    assert counted[:3] == [*sizes[:2], 12] and counted[6] == sizes[2]
    assert counted[3] != sizes[-1] and counted[4:6] == [-1, -1]
