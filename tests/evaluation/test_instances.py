import contextlib
import io
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hourglass import InputError
from hourglass.evaluation import InstanceEvaluator
from hourglass.evaluation.faults import find_faults
from hourglass.evaluation.instances import average_precision, read_matches
from hourglass.evaluation.resampling import draw_samples, ratio_of_samples
from tests.detections import dataset


def sampled(annotations: dict, detections: list[dict], draw: list[int]) -> tuple[dict, list[dict]]:
    """The data set of the images ``draw``, with repeats, which become images of their own."""
    images, objects, sampled_detections = [], [], []
    for new, old in enumerate(draw, start=1):
        images.append(dict(id=new, width=100, height=100))
        for annotation in annotations["annotations"]:
            if annotation["image_id"] == old:
                objects.append(dict(annotation, id=len(objects) + 1, image_id=new))
        sampled_detections += [dict(entry, image_id=new) for entry in detections if entry["image_id"] == old]
    return dict(annotations, images=images, annotations=objects), sampled_detections


def evaluated(annotations: dict, detections: list[dict]) -> COCOeval:
    truth = COCO()
    truth.dataset = annotations
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(detection) for detection in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_all_images_is_cocos(seed):
    evaluation = evaluated(*dataset(seed))
    categories = read_matches(evaluation)
    assert len(categories) == 3
    ap = average_precision(categories, np.ones((1, 12), dtype=int))
    np.testing.assert_allclose(ap, 100 * evaluation.stats[0], atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_a_sample_is_cocos_of_its_images(seed):
    annotations, detections = dataset(seed, digits=9)
    draw = np.random.default_rng(seed).integers(1, 13, 12).tolist()
    weights = np.bincount(draw, minlength=13)[None, 1:]
    ap = average_precision(read_matches(evaluated(annotations, detections)), weights)
    again = evaluated(*sampled(annotations, detections, draw))
    np.testing.assert_allclose(ap, 100 * again.stats[0], atol=1e-9)


def test_a_sample_without_objects_has_no_ap():
    annotations, detections = dataset(0)
    categories = read_matches(evaluated(annotations, detections))
    empty = sum(category.objects for category in categories) == 0
    assert empty.any()
    assert np.isnan(average_precision(categories, empty[None].astype(int)))[0]


def test_the_interval_of_retention_is_paired_and_the_same_twice():
    def ap(detections: list[dict], **options: int) -> np.ndarray:
        return average_precision(read_matches(evaluated(annotations, detections)), draw_samples(12, 200, **options))

    annotations, detections = dataset(1)
    fewer = [detection for i, detection in enumerate(detections) if i % 3]
    assert ratio_of_samples(ap(detections), ap(detections)) == (1.0, 1.0, 1.0)
    share, low, high = ratio_of_samples(ap(detections), ap(fewer))
    assert low < share < high and share < 1
    assert ratio_of_samples(ap(detections), ap(fewer)) == (share, low, high)
    assert ratio_of_samples(ap(detections, seed=1), ap(fewer, seed=1)) != (share, low, high)


def test_one_image_has_no_interval():
    assert draw_samples(1).tolist() == [[1]] and len(draw_samples(2)) > 1
    share, low, high = ratio_of_samples(np.array([50.0]), np.array([25.0]))
    assert share == 0.5 and np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize("seed", range(2))
def test_ap_of_objects_of_some_sizes_is_cocos(seed):
    evaluation = evaluated(*dataset(seed))
    small = average_precision(read_matches(evaluation, (0, 32**2)), np.ones((1, 12), dtype=int))
    medium = average_precision(read_matches(evaluation, (32**2, 96**2)), np.ones((1, 12), dtype=int))
    np.testing.assert_allclose([small[0], medium[0]], 100 * evaluation.stats[3:5], atol=1e-9)


def test_sizes_that_do_not_grow_are_refused():
    for sides in ([20, 10], [10, 10], [0, 10]):
        with pytest.raises(InputError, match="sides must be increasing numbers of pixels over 0"):
            InstanceEvaluator("coco_2017_val", tasks=("bbox",), use_fast_impl=False, sides=sides)


@pytest.mark.parametrize("most", [2, 9, 0, 20.5, "100", True])
def test_limits_that_coco_does_not_take_are_refused(registered, most):
    """COCO would take 10 detections for 2."""
    with pytest.raises(InputError, match=f"max_dets_per_image must be a whole number of at least 10, got {most!r}"):
        InstanceEvaluator(registered(crowded([1])), tasks=("bbox",), max_dets_per_image=most)


@pytest.fixture
def registered(tmp_path):
    """Registers annotations as the data set "test_instances"."""
    name = "test_instances"

    def register(annotations: dict) -> str:
        (tmp_path / "truth.json").write_text(json.dumps(annotations))
        register_coco_instances(name, {}, str(tmp_path / "truth.json"), str(tmp_path))
        DatasetCatalog.get(name)
        return name

    yield register
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def give(evaluator: InstanceEvaluator, image_id: int, boxes: list, scores=None, classes=None) -> None:
    """Detections in the ``boxes`` (x, y, w, h), with masks that fill them."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 100, 100, dtype=torch.bool)
    for mask, (x, y, w, h) in zip(masks, boxes.round().int().tolist()):
        mask[y : y + h, x : x + w] = True
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances((100, 100), pred_boxes=Boxes(boxes), pred_masks=masks)
    instances.scores = torch.rand(len(boxes)) if scores is None else torch.tensor(scores)
    instances.pred_classes = torch.tensor(classes or [0] * len(boxes), dtype=torch.int64)
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])


def crowded(counts: list[int]) -> dict:
    """Images with so many objects of category 1, in rows of ten."""
    annotations, _ = dataset(0, images=len(counts))
    template = dict(category_id=1, iscrowd=0, area=36)
    objects = [
        dict(template, id=image * 1000 + i + 1, image_id=image + 1, bbox=[10 * (i % 10), 10 * (i // 10), 6, 6])
        for image, count in enumerate(counts)
        for i in range(count)
    ]
    for entry in objects:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return dict(annotations, annotations=objects)


def quiet(evaluator: InstanceEvaluator, **options) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate(**options)


@pytest.mark.parametrize("most", [100, 50])
@pytest.mark.parametrize("tasks", [("bbox", "segm"), None], ids=str)
def test_nothing_found_is_0_where_there_is_something_to_find(registered, tasks, most):
    name = registered(crowded([2, 0, 1]))
    evaluator = InstanceEvaluator(name, tasks=tasks, max_dets_per_image=most, sides=(32,))
    evaluator.reset()
    for image in (1, 2, 3):
        give(evaluator, image, [])
    results = quiet(evaluator)
    assert list(results) == ["bbox", "segm"]
    for task in ("bbox", "segm"):
        assert [results[task][metric] for metric in ("AP", "AP50", "AP75", "APs")] == [0, 0, 0, 0]
        assert np.isnan(results[task]["APl"])  # no object is large
        assert results[task]["AP-1"] == 0 and np.isnan(results[task]["AP-2"])
    samples = evaluator.resample(np.array([[1, 1, 1], [0, 3, 0]]))["segm.AP"]
    assert samples[0] == 0 and np.isnan(samples[1])  # the second sample has nothing to find
    # Of the image that has nothing to find alone there is no figure.
    assert np.isnan(quiet(evaluator, img_ids=[2])["bbox"]["AP"])


def test_only_crowds_are_nothing_to_find(registered):
    annotations = crowded([2])
    for annotation in annotations["annotations"]:
        annotation["iscrowd"] = 1
        annotation["segmentation"] = {"size": [100, 100], "counts": [0, 10000]}
    evaluator = InstanceEvaluator(registered(annotations), tasks=("bbox",))
    evaluator.reset()
    give(evaluator, 1, [])
    assert np.isnan(quiet(evaluator)["bbox"]["AP"])


def test_evaluating_twice_gives_the_same(registered):
    """Though the data set's category ids are not those that models give."""
    evaluator = InstanceEvaluator(registered(crowded([2, 1])), tasks=("bbox",))
    evaluator.reset()
    give(evaluator, 1, [[0, 0, 6, 6], [10, 0, 6, 6]])
    give(evaluator, 2, [[0, 0, 6, 6]])
    first = quiet(evaluator)
    assert first["bbox"]["AP"] == pytest.approx(100)
    np.testing.assert_equal(quiet(evaluator), first)


def test_what_detections_an_image_gave_comes_back_from_json(registered):
    annotations, _ = dataset(3)
    name = registered(annotations)
    for tasks in (("bbox", "segm"), None):
        evaluator, again = InstanceEvaluator(name, tasks=tasks), InstanceEvaluator(name, tasks=tasks)
        evaluator.reset()
        again.reset()
        rng = np.random.default_rng(0)
        for image in range(1, 13):
            boxes = [annotation["bbox"] for annotation in annotations["annotations"] if annotation["image_id"] == image]
            shaken = [[value + rng.normal() for value in box] for box in boxes]
            give(evaluator, image, shaken, classes=[int(rng.integers(3)) for _ in boxes])
        evaluator.process([{"image_id": 99}], [{"panoptic_seg": None}])
        for image in (99, *range(12, 0, -1)):
            again.restore(image, json.loads(json.dumps(evaluator.dump(image))))
        results = quiet(evaluator)
        assert results["segm"]["AP"] > 1 and results["bbox"]["AP"] > 1
        np.testing.assert_equal(quiet(again), results)
        weights = draw_samples(12, 20)
        for task, samples in evaluator.resample(weights).items():
            np.testing.assert_array_equal(again.resample(weights)[task], samples)


def test_proposals_come_back_from_json(registered):
    name = registered(crowded([1]))
    evaluator, again = InstanceEvaluator(name, tasks=("bbox",)), InstanceEvaluator(name, tasks=("bbox",))
    evaluator.reset()
    again.reset()
    proposals = Instances((100, 100), proposal_boxes=Boxes(torch.rand(3, 4)), objectness_logits=torch.randn(3))
    evaluator.process([{"image_id": 1}], [{"proposals": proposals}])
    again.restore(1, json.loads(json.dumps(evaluator.dump(1))))
    before, after = (item._predictions[0]["proposals"] for item in (evaluator, again))
    assert after.image_size == (100, 100)
    assert torch.equal(after.proposal_boxes.tensor, before.proposal_boxes.tensor)
    assert torch.equal(after.objectness_logits, before.objectness_logits)


def test_ap_by_class_is_cocos(registered):
    annotations, detections = dataset(2)
    annotations["categories"][1]["name"] = "1"  # as the first is called
    evaluator = InstanceEvaluator(registered(annotations), tasks=("bbox",))
    evaluator.reset()
    for detection in detections:
        detection["category_id"] -= 1
    for image in range(1, 13):
        of_image = [detection for detection in detections if detection["image_id"] == image]
        evaluator.restore(image, {"instances": of_image})
    results = quiet(evaluator)["bbox"]
    classes = evaluator.resample_classes(np.ones((1, 12), int))["bbox.AP"]
    assert list(classes) == ["1 (1)", "1 (2)", "3", "4"]
    assert classes["3"] == pytest.approx(results["AP-3"]) and np.isnan(classes["4"]).all()
    mean = np.mean([classes[name][0] for name in ("1 (1)", "1 (2)", "3")])
    assert mean == pytest.approx(results["AP"])


@pytest.mark.parametrize("most, ap", [(100, 100 * 67 / 101), (200, 100.0)])
def test_objects_over_the_limit_cost_ap_and_are_said(registered, most, ap):
    """150 objects that are all found: 100 detections reach a recall of 2 / 3."""
    annotations = crowded([150, 1])
    evaluator = InstanceEvaluator(registered(annotations), tasks=("bbox",), max_dets_per_image=most)
    evaluator.reset()
    for image in (1, 2):
        boxes = [annotation["bbox"] for annotation in annotations["annotations"] if annotation["image_id"] == image]
        detected = [dict(image_id=image, category_id=0, bbox=box, score=0.9) for box in boxes]
        evaluator.restore(image, {"instances": detected})
    assert quiet(evaluator, img_ids=[1])["bbox"]["AP"] == pytest.approx(ap)
    quiet(evaluator)
    lines = find_faults(torch.nn.Linear(2, 2), [evaluator], np.array([True, True]), in_list=False)
    if most == 200:
        assert lines == []
    else:
        objects, detections = lines
        assert objects.startswith("1 of 2 images have more objects of a class than the 100 detections")
        assert detections.startswith("1 of 2 images have more detections of a class than the 100 detections")
        assert all("dataloader.evaluator.max_dets_per_image=200 raises the limit" in line for line in lines)


def test_a_data_set_without_annotations_is_said(registered):
    """As COCO's test sets are."""
    annotations = crowded([1])
    name = registered(annotations)
    del annotations["annotations"]
    path = MetadataCatalog.get(name).json_file
    with open(path, "w") as file:
        json.dump(annotations, file)
    evaluator = InstanceEvaluator(name, tasks=("bbox",))
    evaluator.reset()
    give(evaluator, 1, [[0, 0, 6, 6]])
    assert quiet(evaluator) == {} and evaluator.resample(np.ones((1, 1), int)) == {}
    assert find_faults(torch.nn.Linear(2, 2), [evaluator], np.array([True])) == [
        "no figure from InstanceEvaluator: the data set has no annotations"
    ]


def test_how_crowded_images_are_is_counted_by_category_too(registered):
    annotations = crowded([3, 1])
    annotations["annotations"][0]["category_id"] = 2
    annotations["annotations"][1]["iscrowd"] = 1
    annotations["annotations"][1]["segmentation"] = {"size": [100, 100], "counts": [0, 10000]}
    evaluator = InstanceEvaluator(registered(annotations), tasks=("bbox",))
    evaluator.reset()
    give(evaluator, 1, [[0, 0, 6, 6]] * 3, classes=[0, 2, 2])
    give(evaluator, 2, [])
    quiet(evaluator)
    assert [values.tolist() for values in evaluator.crowding] == [[2, 1], [3, 0], [1, 1], [2, 0]]
    quiet(evaluator, img_ids=[2])
    assert [values.tolist() for values in evaluator.crowding] == [[1], [0], [1], [0]]


def test_the_evaluator_keeps_the_matches(registered):
    annotations, detections = dataset(2)
    name = registered(annotations)
    evaluator = InstanceEvaluator(name, tasks=("bbox",), max_dets_per_image=50, use_fast_impl=False, sides=(32,))
    assert evaluator.max_detections == 50
    evaluator.reset()
    for image in range(1, 13):
        of_image = [detection for detection in detections if detection["image_id"] == image]
        shifted = [dict(detection, category_id=detection["category_id"] - 1) for detection in of_image]
        evaluator._predictions.append({"image_id": image, "instances": shifted})
    with contextlib.redirect_stdout(io.StringIO()):
        results = evaluator.evaluate()
    ap = average_precision(evaluator.matches["bbox"], np.ones((1, 12), dtype=int))[0]
    np.testing.assert_allclose(ap, results["bbox"]["AP"], atol=1e-9)
    assert evaluator.image_ids == list(range(1, 13))
    np.testing.assert_array_equal(evaluator.resample(np.ones((1, 12), dtype=int))["bbox.AP"], [ap])
    small, large = (matches["bbox"] for matches in evaluator.matches_of_size.values())
    assert list(evaluator.matches_of_size) == [(0, 32), (32, 1e5)]
    ap = average_precision(small, np.ones((1, 12), dtype=int))[0]
    np.testing.assert_allclose(ap, results["bbox"]["APs"], atol=1e-9)
    assert sum(category.objects.sum() for category in small + large) == sum(
        category.objects.sum() for category in evaluator.matches["bbox"]
    )
