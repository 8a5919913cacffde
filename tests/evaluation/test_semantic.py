import json
import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from hourglass import InputError
from hourglass.evaluation import SemanticEvaluator
from hourglass.evaluation.resampling import check_evaluated, draw_samples, ratio_of_samples
from hourglass.evaluation.semantic import class_figures, count_pixels, semantic_figures

CLASSES = ["sky", "road", "tree", "sky"]
NAMES = ["sky (0)", "road", "tree", "sky (3)"]
SIZE = (12, 16)


@pytest.fixture
def streets(tmp_path):
    """The data set "streets": six images with blocks of four classes and of none. Its files can still be changed."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(6):
        truth = rng.choice([0, 1, 2, 3, 255], (3, 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), truth)
        paths = dict(file_name=str(tmp_path / f"{i}.jpg"), sem_seg_file_name=str(tmp_path / f"{i}.png"))
        records.append(dict(paths, image_id=i))
    DatasetCatalog.register("streets", lambda: records)
    MetadataCatalog.get("streets").set(stuff_classes=CLASSES, ignore_label=255)
    yield records
    DatasetCatalog.remove("streets")
    MetadataCatalog.remove("streets")


def logits(record: dict, seed: int = 0) -> torch.Tensor:
    """(4, H, W): mostly the ground truth."""
    truth = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
    noise = torch.randn(len(CLASSES), *truth.shape, generator=torch.Generator().manual_seed(seed + record["image_id"]))
    return noise + 2 * torch.nn.functional.one_hot(torch.tensor(truth % 255, dtype=torch.int64), 4).permute(2, 0, 1)


def run(evaluator, records: list[dict], seed: int = 0):
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"sem_seg": logits(record, seed)}])
    return evaluator


def test_figures_are_those_of_detectron2(streets):
    MetadataCatalog.get("streets").stuff_dataset_id_to_contiguous_id = {i: i for i in range(4)}
    figures = run(SemanticEvaluator("streets"), streets).evaluate()["sem_seg"]
    expected = run(SemSegEvaluator("streets", distributed=False), streets).evaluate()["sem_seg"]
    for metric in ("mIoU", "fwIoU", "mACC", "pACC", "IoU-road", "ACC-road", "IoU-tree", "ACC-tree"):
        assert figures[metric] == pytest.approx(expected[metric], rel=1e-12), metric
    assert 30 < figures["mIoU"] < 95
    # Of two classes with one name, Detectron2 has the last alone.
    assert figures["IoU-sky (3)"] == pytest.approx(expected["IoU-sky"], rel=1e-12) != figures["IoU-sky (0)"]


def test_figures_by_hand():
    truth = np.array([[0, 0, 0, 0, 1, 1, 9, 9]])
    predicted = np.array([[0, 0, 0, 1, 1, 2, 2, 0]])
    counts = count_pixels(truth, predicted, 3)
    assert counts.tolist() == [[4, 2, 0], [3, 2, 1], [3, 1, 0]]
    iou, accuracy = class_figures(counts)
    np.testing.assert_allclose(iou, [75, 100 / 3, np.nan])
    np.testing.assert_allclose(accuracy, [75, 50, np.nan])
    # The third class is predicted and nowhere in the ground truth: it is in no mean.
    assert semantic_figures(counts) == pytest.approx(
        {"mIoU": (75 + 100 / 3) / 2, "fwIoU": 75 * 4 / 6 + 100 / 3 * 2 / 6, "mACC": 62.5, "pACC": 400 / 6}
    )


def test_nothing_right_is_0_and_nothing_to_find_is_none():
    wrong = semantic_figures(count_pixels(np.array([[0, 1]]), np.array([[1, 0]]), 2))
    assert set(wrong.values()) == {0.0}
    empty = semantic_figures(count_pixels(np.array([[2, 2]]), np.array([[1, 0]]), 2))
    assert all(math.isnan(value) for value in empty.values())


def test_samples_are_data_sets_of_their_images(streets):
    evaluator = run(SemanticEvaluator("streets"), streets)
    evaluator.evaluate()
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 0, 0, 1, 0]])
    samples = evaluator.resample(weights)["sem_seg.mIoU"]
    classes = evaluator.resample_classes(weights)["sem_seg.mIoU"]
    assert list(classes) == NAMES
    for sample, ids in enumerate(([0, 1, 2, 3, 4, 5], [1, 1, 4])):
        total = sum(count_pixels(*maps(streets[i]), len(CLASSES)) for i in ids)
        assert samples[sample] == pytest.approx(semantic_figures(total)["mIoU"], rel=1e-12)
        np.testing.assert_allclose([values[sample] for values in classes.values()], class_figures(total)[0])


def maps(record: dict) -> tuple[np.ndarray, np.ndarray]:
    truth = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
    return truth, logits(record).argmax(0).numpy()


def test_the_interval_is_paired(streets):
    def samples(seed):
        evaluator = run(SemanticEvaluator("streets"), streets, seed)
        evaluator.evaluate()
        return evaluator.resample(draw_samples(6, 100))["sem_seg.mIoU"]

    assert ratio_of_samples(samples(0), samples(0)) == (1.0, 1.0, 1.0)
    share, low, high = ratio_of_samples(samples(0), samples(50))
    assert low < share < high


def test_only_some_images(streets):
    evaluator = run(SemanticEvaluator("streets"), streets[:3])
    of_two = evaluator.evaluate(img_ids=[2, 0])
    assert evaluator.image_ids == [0, 2]
    np.testing.assert_equal(of_two, run(SemanticEvaluator("streets"), [streets[0], streets[2]]).evaluate())
    with pytest.raises(InputError, match="1 of the 2 images of data set 'streets' .* were not run, such as 5"):
        evaluator.evaluate(img_ids=[0, 5])


def test_what_was_counted_comes_back_from_json(streets):
    evaluator, again = run(SemanticEvaluator("streets"), streets), SemanticEvaluator("streets")
    bad = logits(streets[3])
    bad[0, 0, 0] = float("nan")
    evaluator.process([streets[3]], [{"sem_seg": bad}])
    for image_id in (5, 0, 1, 2, 4, 3):
        again.restore(image_id, json.loads(json.dumps(evaluator.dump(image_id))))
    np.testing.assert_equal(again.evaluate(), evaluator.evaluate())
    np.testing.assert_array_equal(again._evaluated, evaluator._evaluated)
    assert again.warnings == evaluator.warnings == ["'sem_seg' is not finite in 1 of 6 images"]


def test_logits_that_are_not_finite_are_said(streets):
    evaluator = run(SemanticEvaluator("streets"), streets)
    evaluator.evaluate()
    assert evaluator.warnings == []
    evaluator.process([streets[1]], [{"sem_seg": torch.full((4, *SIZE), float("inf"))}])
    evaluator.evaluate()
    assert evaluator.warnings == ["'sem_seg' is not finite in 1 of 6 images"]
    evaluator.evaluate(img_ids=[0, 2])
    assert evaluator.warnings == []


class TestBadInputs:
    def refusal(self, record: dict, output: dict) -> str:
        with pytest.raises(InputError) as refused:
            SemanticEvaluator("streets").process([record], [output])
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def test_outputs(self, streets):
        assert "gives no 'sem_seg' to evaluate, its output has ['instances']" in self.refusal(
            streets[0], {"instances": 1}
        )
        assert "image 0: the model's 'sem_seg' has 5 classes, data set 'streets' has 4" in self.refusal(
            streets[0], {"sem_seg": torch.zeros(5, *SIZE)}
        )
        assert "image 0: the prediction is 12 x 15, the ground truth 12 x 16" in self.refusal(
            streets[0], {"sem_seg": torch.zeros(4, 12, 15)}
        )
        foreign = dict(streets[0], file_name="other.jpg")
        assert "other.jpg, is not in data set 'streets'" in self.refusal(foreign, {"sem_seg": logits(streets[0])})

    def test_pngs(self, streets):
        output, path = {"sem_seg": logits(streets[0])}, streets[0]["sem_seg_file_name"]
        cv2.imwrite(path, np.full(SIZE, 4, np.uint8))
        # Detectron2 takes the number of classes for none, and counts those over it as others.
        line = f"semantic PNG {path} has class 4: data set 'streets' has 0 to 3, and 255 where there is none"
        assert line in self.refusal(streets[0], output)
        cv2.imwrite(path, np.zeros((*SIZE, 3), np.uint8))
        assert f"semantic PNG {path} is (12, 16, 3): it must have one channel" in self.refusal(streets[0], output)
        with open(path, "wb") as file:
            file.write(b"no image")
        assert f"semantic PNG {path} cannot be read (UnidentifiedImageError" in self.refusal(streets[0], output)
        streets[0]["sem_seg_file_name"] += "x"
        assert f"semantic PNG {path}x is missing" in self.refusal(streets[0], output)

    def test_data_sets(self, streets):
        del streets[2]["sem_seg_file_name"]
        with pytest.raises(InputError, match="1 of the 6 images of data set 'streets' have no 'sem_seg_file_name'"):
            SemanticEvaluator("streets")
        del MetadataCatalog.get("streets").ignore_label
        with pytest.raises(InputError, match="data set 'streets' has no 'ignore_label' in its metadata"):
            SemanticEvaluator("streets")


def test_ids_may_be_numbers_and_text():
    assert check_evaluated("mine", ["b", 10, "a", 9], {"a", "b", 9, 10}) == [9, 10, "a", "b"]
