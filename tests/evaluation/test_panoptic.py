import json
import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators, SemSegEvaluator

from hourglass import InputError
from hourglass.data.panoptic import register_panoptic
from hourglass.evaluation import PanopticEvaluator
from hourglass.evaluation.compare import _evaluate
from hourglass.evaluation.panoptic import count_segments, panoptic_quality
from projects.demo import write_demo
from tests.golden_cases import FOLDER, load

CATEGORIES = [1, 2, 7]  # the last is stuff
NOTHING = [0.0, 0, 0, 0]


def row(*runs: tuple[int, int]) -> np.ndarray:
    """(1, W) ids from (id, how often)."""
    return np.repeat([id for id, _ in runs], [count for _, count in runs])[None]


def truth_info(ids: np.ndarray, categories: dict[int, int], crowds: tuple = ()) -> list[dict]:
    return [
        {"id": id, "category_id": category, "area": int((ids == id).sum()), "iscrowd": int(id in crowds)}
        for id, category in categories.items()
    ]


def count(truth, truth_categories, predicted, predicted_categories, crowds=()) -> list:
    info = [{"id": id, "category_id": category} for id, category in predicted_categories.items()]
    return count_segments(truth, truth_info(truth, truth_categories, crowds), predicted, info, CATEGORIES).tolist()


class TestCountSegments:
    """Rows of ten pixels. Each category has [sum of IoU, matches, false, missed]."""

    def test_a_match_a_false_and_a_missed_one(self):
        truth = row((1, 4), (2, 4), (3, 2))
        predicted = row((5, 5), (7, 2), (6, 1), (7, 2))
        # 5 and 1 share 4 pixels of 5 + 4 - 4: IoU 0.8. 6 and 2 share 1 of 1 + 4 - 1, 7 and 3 share 2 of 4 + 2 - 2.
        counts = count(truth, {1: 1, 2: 1, 3: 7}, predicted, {5: 1, 6: 1, 7: 7})
        assert counts == [[0.8, 1, 1, 1], NOTHING, [0, 0, 1, 1]]

    def test_half_is_no_match_and_a_pixel_more_is(self):
        truth = row((1, 6), (2, 4))
        # 5 and 1 share 3 of 6 pixels, then 4; 6 and 2 share 4 of 7, then 4 of 6.
        half, majority = (count(truth, {1: 1, 2: 2}, row((5, n), (6, 10 - n)), {5: 1, 6: 2}) for n in (3, 4))
        assert half == [[0, 0, 1, 1], [4 / 7, 1, 0, 0], NOTHING]
        assert majority == [[4 / 6, 1, 0, 0], [4 / 6, 1, 0, 0], NOTHING]

    def test_only_the_same_category_matches(self):
        truth = row((1, 10))
        assert count(truth, {1: 1}, row((5, 10)), {5: 2}) == [[0, 0, 0, 1], [0, 0, 1, 0], NOTHING]

    def test_void_is_left_out_of_the_union(self):
        # 5 has 8 pixels: 4 of segment 1, 4 of void. Union 8 + 4 - 4 - 4 = 4: IoU 1.
        assert count(row((1, 4), (0, 6)), {1: 1}, row((5, 8), (0, 2)), {5: 1})[0] == [1.0, 1, 0, 0]

    @pytest.mark.parametrize("void, false", [(5, 1), (6, 0)])
    def test_more_than_half_on_void_is_not_false(self, void, false):
        truth = row((0, void), (1, 10 - void))
        assert count(truth, {1: 7}, row((5, 10)), {5: 1}) == [[0, 0, false, 0], NOTHING, [0, 0, 0, 1]]

    @pytest.mark.parametrize("crowd, false", [(5, 1), (6, 0)])
    def test_more_than_half_on_the_crowd_of_its_category_is_not_false(self, crowd, false):
        truth = row((1, crowd), (2, 10 - crowd))
        # The crowd itself is neither matched, by the whole of it, nor missed.
        assert count(truth, {1: 1, 2: 2}, row((5, 10)), {5: 1}, crowds=(1,))[0] == [0, 0, false, 0]
        assert count(truth, {1: 2, 2: 2}, row((5, 10)), {5: 1}, crowds=(1,))[0] == [0, 0, 1, 0]

    def test_void_and_crowd_count_together(self):
        truth = row((0, 3), (1, 3), (2, 4))
        assert count(truth, {1: 1, 2: 2}, row((5, 10)), {5: 1}, crowds=(1,))[0] == NOTHING

    def test_of_several_crowds_the_last_counts(self):
        truth = row((1, 6), (2, 3), (3, 1))
        categories = {1: 1, 2: 1, 3: 2}
        assert count(truth, categories, row((5, 10)), {5: 1}, crowds=(1, 2))[0] == [0, 0, 1, 0]
        last_first = {2: 1, 1: 1, 3: 2}
        assert count(truth, last_first, row((5, 10)), {5: 1}, crowds=(1, 2))[0] == NOTHING

    def test_a_crowd_is_not_matched(self):
        assert count(row((1, 10)), {1: 1}, row((5, 10)), {5: 1}, crowds=(1,))[0] == NOTHING

    def test_nothing_predicted(self):
        assert count(row((1, 9), (2, 1)), {1: 1, 2: 7}, row((0, 10)), {}) == [[0, 0, 0, 1], NOTHING, [0, 0, 0, 1]]

    def test_an_image_without_a_segment(self):
        # All of the prediction lies on void.
        assert count(row((0, 10)), {}, row((5, 4), (6, 6)), {5: 1, 6: 7}) == [NOTHING] * 3
        assert count(row((0, 10)), {}, row((0, 10)), {}) == [NOTHING] * 3

    @pytest.mark.parametrize("stated", [{"area": 0}, {"area": 5}, {"area": 15}, {"area": None}, {}], ids=str)
    def test_areas_are_counted_whatever_is_stated(self, stated):
        # 5 and 1 share 8 of 10 pixels.
        info = [{"id": 1, "category_id": 1, **stated}]
        predicted = [{"id": 5, "category_id": 1}]
        counts = count_segments(row((1, 10)), info, row((5, 8), (0, 2)), predicted, CATEGORIES)
        assert counts[0].tolist() == [0.8, 1, 0, 0]

    def test_large_ids(self):
        largest = 256**3 - 1
        assert count(row((largest, 10)), {largest: 1}, row((largest, 10)), {largest: 1})[0] == [1.0, 1, 0, 0]

    @pytest.mark.parametrize(
        "predicted, categories, message",
        [
            (row((5, 10)), {}, "has segment 5 in its map, not in segments_info"),
            (row((5, 10)), {5: 1, 6: 1}, "has segment 6 in segments_info, not in its map"),
            (row((5, 10)), {5: 3}, r"segment 5 of the prediction has category_id 3, which is none of \[1, 2, 7\]"),
            (row((5, 9), (-1, 1)), {5: 1}, "at least 0, .* got -1"),
            (row((5, 9), (0, 1)), {5: 1, 0: 1}, "ids must be at least 1"),
            (row((5, 9)), {5: 1}, "the prediction is 1 x 9, the panoptic ground truth 1 x 10"),
        ],
    )
    def test_errors_say_what_was_given(self, predicted, categories, message):
        with pytest.raises(InputError, match=message):
            count(row((1, 10)), {1: 1}, predicted, categories)


class TestPanopticQuality:
    def test_by_hand(self):
        # Category 1: PQ 1.5 / (2 + 1/2 + 1/2) = 0.5, SQ 1.5 / 2, RQ 2 / 3. Category 2 does not occur. 7: PQ 0.6.
        figures = panoptic_quality(np.array([[1.5, 2, 1, 1], NOTHING, [0.6, 1, 0, 0]]), [True, True, False])
        expected = {"PQ": 55, "SQ": 67.5, "RQ": 250 / 3, "PQ_th": 50, "SQ_th": 75, "RQ_th": 200 / 3}
        assert figures == pytest.approx({**expected, "PQ_st": 60, "SQ_st": 60, "RQ_st": 100})

    def test_a_category_that_is_never_matched_has_nothing(self):
        assert panoptic_quality(np.array([[0.0, 0, 1, 0]]), [True])["PQ"] == 0

    def test_no_category_has_no_figure(self):
        figures = panoptic_quality(np.array([[1.0, 1, 0, 0]]), [True])
        assert figures["PQ"] == figures["PQ_th"] == 100 and math.isnan(figures["PQ_st"])
        assert all(math.isnan(value) for value in panoptic_quality(np.array([NOTHING]), [True]).values())


def golden() -> tuple[dict, np.ndarray, np.ndarray]:
    case, maps = load("pq_synthetic")
    return json.loads((FOLDER / case["json_file"]).read_text()), maps["gt_ids"].numpy(), maps["pred_ids"].numpy()


def test_the_official_counts_and_figures():
    content, truth, predicted = golden()
    categories = [category["id"] for category in content["categories"]]
    total = sum(
        count_segments(truth[i], image["gt_segments_info"], predicted[i], image["pred_segments_info"], categories)
        for i, image in enumerate(content["annotations"])
    )
    for category, counts in zip(categories, total):
        official = content["counts_per_category"][str(category)]
        assert counts[1:].tolist() == [official["tp"], official["fp"], official["fn"]]
        assert counts[0] == pytest.approx(official["iou"], abs=1e-9)
    figures = panoptic_quality(total, [category["isthing"] for category in content["categories"]])
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for metric in ("pq", "sq", "rq"):
            assert figures[metric.upper() + suffix] / 100 == pytest.approx(content["results"][group][metric], abs=1e-9)


def test_panopticapi_counts_the_same(tmp_path):
    evaluation = pytest.importorskip("panopticapi.evaluation")
    utils = pytest.importorskip("panopticapi.utils")
    from PIL import Image

    rng = np.random.default_rng(0)
    categories = {id: {"id": id, "isthing": int(id != 7)} for id in CATEGORIES}
    pairs, total = [], np.zeros((3, 4))
    for image in range(8):
        truth = rng.integers(0, 9, (6, 8)).repeat(8, 0).repeat(8, 1)
        predicted = np.where(rng.random((6, 8)).repeat(8, 0).repeat(8, 1) < 0.8, truth, rng.integers(0, 9, truth.shape))
        kinds = dict(zip(range(1, 9), rng.choice(CATEGORIES, 8).tolist()))
        present = [{id: kinds[id] for id in np.unique(ids).tolist() if id} for ids in (truth, predicted)]
        infos = [truth_info(ids, categories, (1, 2)) for ids, categories in zip((truth, predicted), present)]
        total += count_segments(truth, infos[0], predicted, infos[1], CATEGORIES)
        for folder, ids in (("truth", truth), ("predicted", predicted)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(utils.id2rgb(ids)).save(tmp_path / folder / f"{image}.png")
        pairs.append([{"image_id": image, "file_name": f"{image}.png", "segments_info": info} for info in infos])
    statistics = evaluation.pq_compute_single_core(0, pairs, tmp_path / "truth", tmp_path / "predicted", categories)
    official = [[stat.iou, stat.tp, stat.fp, stat.fn] for stat in (statistics[id] for id in CATEGORIES)]
    np.testing.assert_allclose(total, official, atol=1e-9)


# Two images of 4 x 8 pixels: cells (id 1, a thing) on ground (id 5, stuff). The second has no segment at all.
TRUTH = row((300, 2), (2, 2), (0, 1), (3, 3)).repeat(4, 0)
SEGMENTS = [
    {"id": 300, "category_id": 1, "area": 8, "iscrowd": 0},
    {"id": 2, "category_id": 1, "area": 8, "iscrowd": 0},
    {"id": 3, "category_id": 5, "area": 12, "iscrowd": 0},
]
CONTENT = {
    "images": [{"id": id, "file_name": f"{id}.jpg", "height": 4, "width": 8} for id in ("a", "b")],
    "annotations": [
        {"image_id": "a", "file_name": "a.png", "segments_info": SEGMENTS},
        {"image_id": "b", "file_name": "b.png", "segments_info": []},
    ],
    "categories": [
        {"id": 5, "name": "ground", "isthing": 0},
        {"id": 1, "name": "cell", "isthing": 1},
    ],
}


def write_png(path, ids: np.ndarray) -> None:
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    cv2.imwrite(str(path), colours[..., ::-1])


@pytest.fixture
def cells(tmp_path):
    """The folder of the data set "cells"; its contents can still be changed."""
    (tmp_path / "panoptic").mkdir()
    (tmp_path / "panoptic.json").write_text(json.dumps(CONTENT))
    write_png(tmp_path / "panoptic" / "a.png", TRUTH)
    write_png(tmp_path / "panoptic" / "b.png", np.zeros_like(TRUTH))
    (tmp_path / "semantic").mkdir()
    classes = np.select([np.isin(TRUTH, [300, 2]), TRUTH == 3], [0, 1], 255)
    cv2.imwrite(str(tmp_path / "semantic" / "a.png"), classes)
    cv2.imwrite(str(tmp_path / "semantic" / "b.png"), np.full_like(classes, 255))
    folders = dict(panoptic_root=tmp_path / "panoptic", sem_seg_root=tmp_path / "semantic")
    register_panoptic("cells", image_root=tmp_path, panoptic_json=tmp_path / "panoptic.json", **folders)
    yield tmp_path
    DatasetCatalog.remove("cells")
    MetadataCatalog.remove("cells")


PERFECT = [
    {"id": 1, "category_id": 0, "isthing": True},
    {"id": 2, "category_id": 0, "isthing": True},
    {"id": 4, "category_id": 1, "isthing": False},
]
MAP = row((1, 2), (2, 3), (4, 3)).repeat(4, 0)


def give(evaluator, image_id: str, segments=MAP, info=PERFECT) -> None:
    output = {"panoptic_seg": (torch.tensor(segments, dtype=torch.int32), info)}
    evaluator.process([{"image_id": image_id, "file_name": f"{image_id}.jpg"}], [output])


class TestPanopticEvaluator:
    def test_a_perfect_prediction(self, cells):
        evaluator = PanopticEvaluator("cells")
        give(evaluator, "a")
        give(evaluator, "b")  # on nothing but void
        assert set(evaluator.evaluate()["panoptic_seg"].values()) == {100.0}
        assert evaluator.counts["a"].tolist() == [[2, 2, 0, 0], [1, 1, 0, 0]]
        assert not evaluator.counts["b"].any()
        assert all("id" in segment for segment in PERFECT)  # what the model gave stays as it was

    def test_figures_by_hand(self, cells):
        evaluator = PanopticEvaluator("cells")
        # The second cell is taken for ground: 1 of 2 cells is found, the ground has IoU 12 / 20 beside 4 void pixels.
        give(evaluator, "a", row((1, 2), (4, 6)).repeat(4, 0), [PERFECT[0], PERFECT[2]])
        give(evaluator, "b", np.zeros_like(MAP), [])
        figures = evaluator.evaluate()["panoptic_seg"]
        assert figures["RQ_th"] == pytest.approx(100 * 1 / 1.5) and figures["SQ_th"] == 100
        assert figures["PQ_st"] == pytest.approx(60)
        assert figures["PQ"] == pytest.approx((100 / 1.5 + 60) / 2)

    def test_without_segments_info(self, cells):
        evaluator = PanopticEvaluator("cells")
        give(evaluator, "a", row((0, 2), (1, 2), (-1, 1), (1000, 3)).repeat(4, 0), None)
        assert evaluator.evaluate(["a"])["panoptic_seg"]["PQ"] == 100

    def test_ids_of_the_data_set_itself(self, cells):
        evaluator = PanopticEvaluator("cells")
        info = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 1}, {"id": 4, "category_id": 5}]
        give(evaluator, "a", info=info)
        assert evaluator.evaluate(["a"])["panoptic_seg"]["PQ"] == 100

    def test_only_some_images(self, cells):
        evaluator = PanopticEvaluator("cells")
        give(evaluator, "a")
        assert evaluator.evaluate(img_ids=["a"])["panoptic_seg"]["PQ"] == 100
        with pytest.raises(InputError, match="1 of the 2 images of data set 'cells' .* were not run, such as 'b'"):
            evaluator.evaluate()
        evaluator.reset()
        give(evaluator, "b")
        assert math.isnan(evaluator.evaluate(img_ids=["b"])["panoptic_seg"]["PQ"])

    def test_a_stuff_that_things_hide_is_missed(self, cells):
        content = json.loads(json.dumps(CONTENT))
        content["annotations"][0]["segments_info"].append({"id": 9, "category_id": 5, "area": 1, "iscrowd": 0})
        (cells / "panoptic.json").write_text(json.dumps(content))
        evaluator = PanopticEvaluator("cells")
        give(evaluator, "a")
        assert evaluator.counts["a"].tolist() == [[2, 2, 0, 0], [1, 1, 0, 1]]

    @pytest.mark.parametrize("state", [lambda area: 0, lambda area: area // 2, lambda area: 32, None])
    def test_the_areas_of_the_json_are_not_believed(self, cells, state):
        """Of nothing, halved, the image's and none at all: the quality is that of the right ones."""
        content = json.loads(json.dumps(CONTENT))
        for segment in content["annotations"][0]["segments_info"]:
            area = segment.pop("area")
            if state:
                segment["area"] = state(area)
        (cells / "panoptic.json").write_text(json.dumps(content))
        evaluator = PanopticEvaluator("cells")
        give(evaluator, "a", row((1, 2), (4, 6)).repeat(4, 0), [PERFECT[0], PERFECT[2]])
        figures = evaluator.evaluate(["a"])["panoptic_seg"]
        assert figures["PQ"] == pytest.approx((100 / 1.5 + 60) / 2) and figures["PQ_st"] == pytest.approx(60)

    def test_a_segment_that_is_twice_in_the_json_is_refused(self, cells):
        content = json.loads(json.dumps(CONTENT))
        content["annotations"][0]["segments_info"].append({"id": 3, "category_id": 5})
        (cells / "panoptic.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="segment 3 of image a occurs more than once"):
            give(PanopticEvaluator("cells"), "a")

    def test_nothing_found_has_quality_0(self, cells):
        evaluator = PanopticEvaluator("cells")
        give(evaluator, "a", np.zeros_like(MAP), [])
        figures = evaluator.evaluate(["a"])["panoptic_seg"]
        assert figures["PQ"] == figures["PQ_th"] == figures["PQ_st"] == figures["SQ"] == 0
        assert evaluator.resample(np.ones((1, 1), int))["panoptic_seg.PQ"].tolist() == [0]

    def test_quality_by_class_and_of_samples(self, cells):
        evaluator = PanopticEvaluator("cells")
        give(evaluator, "a", row((1, 2), (4, 6)).repeat(4, 0), [PERFECT[0], PERFECT[2]])
        give(evaluator, "b", np.zeros_like(MAP), [])
        figures = evaluator.evaluate()["panoptic_seg"]
        weights = np.array([[1, 1], [3, 0], [0, 2]])  # the second image has nothing
        classes = evaluator.resample_classes(weights)["panoptic_seg.PQ"]
        assert list(classes) == ["cell", "ground"]
        np.testing.assert_allclose(classes["cell"], [100 / 1.5, 100 / 1.5, np.nan])
        np.testing.assert_allclose(classes["ground"], [60, 60, np.nan])
        samples = evaluator.resample(weights)["panoptic_seg.PQ"]
        np.testing.assert_allclose(samples, [figures["PQ"], figures["PQ"], np.nan])

    def test_what_was_counted_comes_back_from_json(self, cells):
        evaluator, again = PanopticEvaluator("cells"), PanopticEvaluator("cells")
        give(evaluator, "a", row((1, 2), (4, 6)).repeat(4, 0), [PERFECT[0], PERFECT[2]])
        give(evaluator, "b", np.zeros_like(MAP), [])
        for image_id in ("b", "a"):
            again.restore(image_id, json.loads(json.dumps(evaluator.dump(image_id))))
        assert again.evaluate() == evaluator.evaluate()
        np.testing.assert_array_equal(again._evaluated, evaluator._evaluated)

    def test_beside_other_evaluators(self, cells):
        """One run, several tasks; semantic segmentation is Detectron2's, of the images that were run."""
        evaluators = DatasetEvaluators([PanopticEvaluator("cells"), SemSegEvaluator("cells")])
        evaluators.reset()
        logits = torch.zeros(2, 4, 8)
        logits[0, :, :4] = 1  # cells
        logits[1, :, 4:] = 1  # ground, of which one column is cell in the prediction
        logits[0, :, 7] = 2
        output = {"panoptic_seg": (torch.tensor(MAP), PERFECT), "sem_seg": logits}
        evaluators.process([{"image_id": "a", "file_name": str(cells / "a.jpg")}], [output])
        figures = _evaluate(evaluators, ["a"])
        assert figures["panoptic_seg"]["PQ"] == 100
        # Cells: 16 pixels right, 4 more predicted. Ground: 8 of 12 right.
        assert figures["sem_seg"]["mIoU"] == pytest.approx(100 * (16 / 20 + 8 / 12) / 2)
        with pytest.raises(InputError, match="two that evaluate 'panoptic_seg'"):
            twice = DatasetEvaluators([PanopticEvaluator("cells"), PanopticEvaluator("cells")])
            twice.process([{"image_id": "a"}], [output])
            _evaluate(twice, ["a"])


class TestBadInputs:
    def refusal(self) -> str:
        with pytest.raises(InputError) as refused:
            give(PanopticEvaluator("cells"), "a")
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def test_missing_files(self, cells):
        (cells / "panoptic" / "a.png").unlink()
        assert f"panoptic PNG {cells / 'panoptic' / 'a.png'} is missing" in self.refusal()
        (cells / "panoptic.json").unlink()
        assert f"panoptic JSON {cells / 'panoptic.json'} cannot be read (FileNotFoundError" in self.refusal()

    @pytest.mark.parametrize(
        "text, message",
        [
            ("{", "cannot be read (JSONDecodeError"),
            ("[]", "has no list 'annotations', it has list"),
            ('{"annotations": []}', "has no list 'categories', it has ['annotations']"),
            ('{"annotations": [{"image_id": 1}], "categories": []}', "an entry lacks 'file_name'"),
            ('{"annotations": [], "categories": [{"id": 1, "name": "cell"}]}', "an entry lacks 'isthing'"),
            ('{"annotations": [3], "categories": []}', "is not in COCO's panoptic format"),
            (json.dumps(CONTENT).replace('"category_id": 5', '"category_id": 6'), "of image a has category_id 6"),
        ],
    )
    def test_a_json_that_is_none(self, cells, text, message):
        (cells / "panoptic.json").write_text(text)
        assert message in self.refusal()

    @pytest.mark.parametrize(
        "change, message",
        [
            ({2: 8}, "has 1 segment ids that its segments_info lacks, such as 8"),
            ({300: 2}, "lacks 1 of the things in its segments_info, such as segment 300"),
        ],
    )
    def test_ids_that_disagree(self, cells, change, message):
        ids = TRUTH.copy()
        for old, new in change.items():
            ids[ids == old] = new
        write_png(cells / "panoptic" / "a.png", ids)
        refusal = self.refusal()
        assert message in refusal and f"{cells / 'panoptic' / 'a.png'}" in refusal and "'a' of data set" in refusal

    def test_pngs_that_are_none(self, cells):
        path = cells / "panoptic" / "a.png"
        cv2.imwrite(str(path), TRUTH.astype(np.uint8))
        assert f"panoptic PNG {path} is (4, 8) uint8: it must be 8 bit RGB" in self.refusal()
        path.write_bytes(path.read_bytes()[:40])
        assert f"panoptic PNG {path} cannot be read" in self.refusal()

    def test_what_the_model_gives(self, cells):
        evaluator = PanopticEvaluator("cells")
        with pytest.raises(InputError, match="no 'panoptic_seg' to evaluate, its output has .'instances'."):
            evaluator.process([{"image_id": "a"}], [{"instances": None}])
        with pytest.raises(InputError, match="image 'c' is not in the panoptic JSON of data set 'cells'"):
            give(evaluator, "c")
        with pytest.raises(InputError, match="a thing of category 1, the data set .0."):
            give(evaluator, "a", info=[*PERFECT[:2], {"id": 4, "category_id": 1, "isthing": True}])
        with pytest.raises(InputError, match="image 'a' of data set 'cells': the prediction is 4 x 7"):
            give(evaluator, "a", MAP[:, 1:])

    def test_a_data_set_that_is_not_panoptic(self):
        with pytest.raises(InputError, match="'coco_2017_val' has no 'panoptic_json' in its metadata"):
            PanopticEvaluator("coco_2017_val")


def test_a_drawn_scene_against_itself_and_another(tmp_path):
    write_demo(tmp_path, {"val": 2})
    annotations = tmp_path / "annotations"
    paths = dict(panoptic_json=annotations / "panoptic_val.json", panoptic_root=annotations / "panoptic_val")
    register_panoptic("scenes", image_root=tmp_path / "val", instances_json=annotations / "instances_val.json", **paths)
    try:
        records = DatasetCatalog.get("scenes")
        assert {segment["isthing"] for segment in records[0]["segments_info"]} == {True, False}
        evaluator = PanopticEvaluator("scenes")
        outputs = [
            (cv2.imread(record["pan_seg_file_name"])[..., 2].astype(np.int32), record["segments_info"])
            for record in records
        ]
        for record, output in zip(records, outputs):
            give(evaluator, record["image_id"], *output)
        assert set(evaluator.evaluate()["panoptic_seg"].values()) == {100.0}
        for record, output in zip(records, reversed(outputs)):
            give(evaluator, record["image_id"], *output)
        assert evaluator.evaluate()["panoptic_seg"]["PQ_th"] < 10
    finally:
        DatasetCatalog.remove("scenes")
        MetadataCatalog.remove("scenes")
