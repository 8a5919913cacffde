import contextlib
import io
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hourglass import InputError
from hourglass.evaluation import InstanceEvaluator
from hourglass.evaluation.instances import average_precision, read_matches
from hourglass.evaluation.resampling import draw_samples, ratio_of_samples


def dataset(seed: int, images: int = 12, digits: int = 1) -> tuple[dict, list[dict]]:
    """
    Objects of three categories, some crowds, and detections: of objects, shaken, and of nothing. With few ``digits``
    their scores tie.
    """
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = (float(value) for value in (*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)))
            category = int(rng.integers(1, 4))
            crowd = int(rng.random() < 0.1)
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            objects.append(
                dict(
                    id=len(objects) + 1,
                    image_id=image,
                    category_id=category,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=crowd,
                    segmentation={"size": [100, 100], "counts": [0, 10000]} if crowd else polygon,
                )
            )
            for _ in range(rng.integers(0, 3)):
                box = [x + rng.normal(0, 3), y + rng.normal(0, 3), w * rng.uniform(0.8, 1.2), h * rng.uniform(0.8, 1.2)]
                detections.append(
                    dict(image_id=image, category_id=category, bbox=box, score=round(rng.random(), digits))
                )
        if rng.random() < 0.5:
            box = [*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)]
            detections.append(dict(image_id=image, category_id=1, bbox=box, score=round(rng.random(), digits)))
    sized = [dict(id=i, width=100, height=100, file_name=f"{i}.jpg") for i in range(1, images + 1)]
    categories = [dict(id=i, name=str(i)) for i in range(1, 5)]  # the last has no object
    return dict(images=sized, annotations=objects, categories=categories), detections


def sampled(annotations: dict, detections: list[dict], draw: list[int]) -> tuple[dict, list[dict]]:
    """The data set of the images ``draw``, with repeats, which become images of their own."""
    images, objects, found = [], [], []
    for new, old in enumerate(draw, start=1):
        images.append(dict(id=new, width=100, height=100))
        for one in annotations["annotations"]:
            if one["image_id"] == old:
                objects.append(dict(one, id=len(objects) + 1, image_id=new))
        found += [dict(one, image_id=new) for one in detections if one["image_id"] == old]
    return dict(annotations, images=images, annotations=objects), found


def evaluated(annotations: dict, detections: list[dict]) -> COCOeval:
    truth = COCO()
    truth.dataset = annotations
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(one) for one in detections]), "bbox")
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
    fewer = [one for i, one in enumerate(detections) if i % 3]
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
        with pytest.raises(InputError, match="sides takes growing numbers of pixels over 0"):
            InstanceEvaluator("coco_2017_val", tasks=("bbox",), use_fast_impl=False, sides=sides)


def test_the_evaluator_keeps_the_matches(tmp_path):
    annotations, detections = dataset(2)
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    name = "test_instances"
    register_coco_instances(name, {}, str(tmp_path / "truth.json"), str(tmp_path))
    try:
        DatasetCatalog.get(name)
        evaluator = InstanceEvaluator(name, tasks=("bbox",), max_dets_per_image=50, use_fast_impl=False, sides=(32,))
        assert evaluator.max_detections == 50
        evaluator.reset()
        for image in range(1, 13):
            found = [dict(one, category_id=one["category_id"] - 1) for one in detections if one["image_id"] == image]
            evaluator._predictions.append({"image_id": image, "instances": found})
        with contextlib.redirect_stdout(io.StringIO()):
            results = evaluator.evaluate()
        ap = average_precision(evaluator.matches["bbox"], np.ones((1, 12), dtype=int))[0]
        np.testing.assert_allclose(ap, results["bbox"]["AP"], atol=1e-9)
        assert evaluator.image_ids == list(range(1, 13))
        np.testing.assert_array_equal(evaluator.resample(np.ones((1, 12), dtype=int))["bbox.AP"], [ap])
        small, large = (each["bbox"] for each in evaluator.matches_of_size.values())
        assert list(evaluator.matches_of_size) == [(0, 32), (32, 1e5)]
        ap = average_precision(small, np.ones((1, 12), dtype=int))[0]
        np.testing.assert_allclose(ap, results["bbox"]["APs"], atol=1e-9)
        assert sum(one.objects.sum() for one in small + large) == sum(
            one.objects.sum() for one in evaluator.matches["bbox"]
        )
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
