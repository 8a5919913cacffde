import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
)

from hourglass import InputError, Plan, SkipBlocks, TokenClustering, expedite
from hourglass.evaluation import Subject, compare, describe, to_json, to_table, write_report
from hourglass.evaluation.compare import Comparison, Measurement
from hourglass.evaluation.timing import Run
from tests.evaluation.test_timing import Detector, tiny_vit


class Recorder(DatasetEvaluator):
    """Remembers what it is given; its AP is how many images it saw."""

    def reset(self):
        self.seen = []

    def process(self, inputs, outputs):
        self.seen += [each["image_id"] for each in inputs]

    def evaluate(self, img_ids=None):
        print("a table of its own")
        return {"bbox": {"AP": float(len(self.seen if img_ids is None else img_ids))}}


def subjects() -> dict[str, Subject]:
    torch.manual_seed(0)
    encoder = tiny_vit()
    plans = {"unmodified": Plan(), "expedited": Plan(TokenClustering((5, 4)), 1), "control": Plan(SkipBlocks(), 1)}
    models = {name: Detector(expedite(encoder, plan)).eval() for name, plan in plans.items()}
    return {name: Subject(model, model.encoder, Recorder()) for name, model in models.items()}


def images(count: int) -> list[list[dict]]:
    return [[{"image": torch.randn(3, 64, 64), "image_id": i}] for i in range(count)]


def test_every_model_sees_every_image_once_and_in_turn(capsys):
    order, compared = [], subjects()
    for name, subject in compared.items():
        subject.model.register_forward_hook(lambda *_, name=name: order.append(name[0]))
    comparison = compare(compared, images(3), warmup=2)
    assert "".join(order) == "uecuec" + "uec" + "ceu" + "uec"
    for name, subject in compared.items():
        assert subject.evaluator.seen == [0, 1, 2], name
        assert comparison.models[name].accuracy == {"bbox": {"AP": 3.0}}
        assert {len(times) for times in comparison.models[name].runs.values()} == {3}
    assert "a table of its own" not in capsys.readouterr().out


def test_only_the_images_that_were_run_are_evaluated():
    comparison = compare(subjects(), images(2))
    assert comparison.models["control"].accuracy["bbox"]["AP"] == 2.0


class Segments(Recorder):
    """Its PQ is how many images it saw; takes no ids of images, as most of Detectron2's evaluators."""

    def evaluate(self):
        return {"panoptic_seg": {"PQ": float(len(self.seen))}}


def test_several_evaluators_of_one_run():
    compared = subjects()
    for name, subject in compared.items():
        compared[name] = subject._replace(evaluator=DatasetEvaluators([Recorder(), Segments()]))
    comparison = compare(compared, images(3))
    for measured in comparison.models.values():
        assert measured.accuracy == {"bbox": {"AP": 3.0}, "panoptic_seg": {"PQ": 3.0}}
    assert {name: share.ratio for name, share in comparison.retention("expedited").items()} == {
        "bbox.AP": 1.0,
        "panoptic_seg.PQ": 1.0,
    }


def whole_set_evaluators(tmp_path) -> list[DatasetEvaluator]:
    """Those of Detectron2 that evaluate all images of their annotations, here 0 to 2, whichever ran."""
    every = SimpleNamespace(imgs={0: {}, 1: {}, 2: {}})
    kinds = (LVISEvaluator, RotatedCOCOEvaluator, PascalVOCDetectionEvaluator)
    found = [(mixed := type(kind.__name__, (Recorder, kind), {})).__new__(mixed) for kind in kinds]
    found[0]._lvis_api = found[1]._coco_api = every
    (tmp_path / "val.txt").write_text("0\n1\n2\n")
    found[2]._image_set_path = str(tmp_path / "val.txt")
    return found


@pytest.mark.parametrize("which", range(3))
def test_evaluators_of_a_whole_data_set_refuse_a_part_of_it(tmp_path, which):
    compared = subjects()
    text = which == 2  # Pascal VOC's ids are file names
    inputs = [[{**image[0], "image_id": str(i) if text else i}] for i, image in enumerate(images(3))]
    for name, subject in compared.items():
        compared[name] = subject._replace(evaluator=whole_set_evaluators(tmp_path)[which])
    with pytest.raises(InputError, match="evaluates all 3 images of its annotations, 2 ran"):
        compare(compared, inputs[:2])
    assert compare(compared, inputs).models["unmodified"].accuracy == {"bbox": {"AP": 3.0}}


def test_images_that_run_twice_or_are_not_annotated_are_refused():
    with pytest.raises(InputError, match="an image is compared once, got 1 again"):
        compare(subjects(), [*images(2), images(2)[1]])
    with pytest.raises(InputError, match="an image to be compared has an 'image_id', got \\['image'\\]"):
        compare(subjects(), [[{"image": torch.zeros(3, 64, 64)}]])
    compared = subjects()
    for subject in compared.values():
        subject.evaluator._coco_api = SimpleNamespace(imgs={0: {}, 1: {}})
    with pytest.raises(InputError, match="image 2 is not among the 2 images of the evaluator's annotations"):
        compare(compared, images(3))


class Drawn(Recorder):
    """Its AP is the mean of its images' worth."""

    max_detections = 7

    def __init__(self, worth):
        self.worth = np.array(worth)
        self.image_ids = []

    def evaluate(self, img_ids=None):
        self.image_ids = sorted(self.seen)
        return {"bbox": {"AP": self.worth.mean()}}

    def resample(self, weights):
        return {"bbox.AP": weights @ self.worth / weights.sum(1)}


def test_retention_has_a_paired_interval_over_images():
    compared = subjects()
    worths = {"unmodified": [10.0, 50.0, 90.0], "expedited": [5.0, 25.0, 45.0], "control": [9.0, 5.0, 1.0]}
    for name, subject in compared.items():
        compared[name] = subject._replace(evaluator=Drawn(worths[name]))
    comparison = compare(compared, images(3))
    assert comparison.max_detections == 7
    # Half of it on every image: nothing to be unsure of, however much images differ.
    assert comparison.retention("expedited")["bbox.AP"] == (0.5, 0.5, 0.5)
    share, low, high = comparison.retention("control")["bbox.AP"]
    assert share == 15 / 150 and low < share < high


def test_a_batch_of_several_images_is_refused():
    compared = subjects()
    with pytest.raises(InputError, match="one image at a time, got a batch of 2"):
        compare(compared, [images(1)[0] * 2])
    # Nothing stays behind on the models.
    assert not any(subject.encoder._forward_hooks for subject in compared.values())


def test_models_are_left_in_the_mode_that_they_were_in():
    compared = subjects()
    compared["expedited"].model.train()
    compare(compared, images(1))
    assert compared["expedited"].model.training and compared["expedited"].encoder.training
    assert not compared["unmodified"].model.training


def measurement(ap: float, encoder: list[float], reduction: float = 0.0, tokens=(0, 0)) -> Measurement:
    runs = [Run(2 * time, time, reduction, *tokens, 64) for time in encoder]
    return Measurement(
        accuracy={"bbox": {"AP": ap, "AP50": 60.0, "AP-disc": 3.0}, "segm": {"AP": float("nan")}},
        samples={"bbox.AP": np.array([ap, 0.8 * ap, ap])},
        runs={part: np.array([getattr(run, part) for run in runs]) for part in Run._fields},
        encoder_gflops=2.0,
        peak_memory_mb=100.0,
    )


def document(**models) -> dict:
    about = dict(dataset="scenes", device="cpu", dtype="float32", plan=Plan(TokenClustering((5, 4)), 1).describe())
    return to_json(Comparison(models), **about)


def test_the_documents_figures_by_hand():
    content = document(
        unmodified=measurement(50.0, [10.0, 20.0, 30.0]),
        **{"fast attention": measurement(50.0, [8.0, 16.0, 24.0])},
        expedited=measurement(49.0, [5.0, 10.0, 15.0], reduction=1.0, tokens=(64, 20)),
        control=measurement(25.0, [1.0, 2.0, 3.0], tokens=(64, 0)),
    )
    assert content["schema"] == 2 and content["images"] == 3 and content["plan"]["reducer"]["grid"] == [5, 4]
    assert content["speedup"]["encoder"]["ratio"] == content["speedup"]["total"]["ratio"] == 2.0
    assert content["retention"]["bbox.AP"] == pytest.approx({"ratio": 0.98, "low": 0.98, "high": 0.98})
    assert content["retention"]["segm.AP"] == {"ratio": None, "low": None, "high": None}
    assert content["control_retention"]["bbox.AP"]["ratio"] == 0.5
    assert content["fast_attention"]["speedup"]["encoder"]["ratio"] == 1.25
    assert content["fast_attention"]["retention"]["bbox.AP"]["ratio"] == 1.0
    assert content["efficiency"] == pytest.approx(0.9)
    unmodified, expedited = content["models"]["unmodified"], content["models"]["expedited"]
    assert unmodified["accuracy"]["bbox"] == {"AP": 50.0, "AP50": 60.0}
    assert unmodified["latency_ms"]["encoder"] == {"median": 20.0, "p10": 12.0, "p90": 28.0}
    assert unmodified["tokens"] == {"full": 64.0, "middle": 64.0}
    assert expedited["tokens"] == {"full": 64.0, "middle": 20.0}
    assert content["models"]["control"]["tokens"]["middle"] == 0.0

    table = to_table(content)
    for cell in (
        "100.0 %",
        "1.25x (1.25-1.25)",
        "98.0 % (98.0-98.0)",
        "50.0 %",
        "2.00x (2.00-2.00)",
        "20 of 64",
        "20.0 (12.0-28.0)",
        "90.0 %",
        " - ",
    ):
        assert cell in table
    assert "TokenClustering(grid=[5, 4]" in describe(content)


def segmentation(pq: float, miou: float) -> Measurement:
    panoptic = {f"{metric}{suffix}": pq for suffix in ("", "_th", "_st") for metric in ("PQ", "SQ", "RQ")}
    semantic = {"mIoU": miou, "fwIoU": 70.0, "IoU-sky": 3.0, "mACC": 80.0, "pACC": 90.0, "ACC-sky": 4.0}
    return measurement(50.0, [5.0])._replace(samples={}, accuracy={"panoptic_seg": panoptic, "sem_seg": semantic})


def test_figures_of_segmentation():
    content = document(
        unmodified=segmentation(40.0, 60.0), expedited=segmentation(36.0, 57.0), control=segmentation(4.0, float("nan"))
    )
    kept = {name: share["ratio"] for name, share in content["retention"].items()}
    assert kept == {"panoptic_seg.PQ": 0.9, "sem_seg.mIoU": 0.95}
    assert content["control_retention"]["panoptic_seg.PQ"] == {"ratio": 0.1, "low": None, "high": None}
    assert content["control_retention"]["sem_seg.mIoU"]["ratio"] is None
    accuracy = content["models"]["unmodified"]["accuracy"]
    assert accuracy["sem_seg"] == {"mIoU": 60.0, "fwIoU": 70.0, "mACC": 80.0, "pACC": 90.0}
    names = ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"]
    assert accuracy["panoptic_seg"] == dict.fromkeys(names, 40.0)

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in to_table(content, "github").splitlines()[2:]]
    labels = ["PQ", "SQ", "RQ", "PQ things", "SQ things", "RQ things", "PQ stuff", "SQ stuff", "RQ stuff", "mIoU"]
    assert [line[0] for line in lines[:11]] == [*labels, "encoder latency, ms (p10-p90)"]
    assert lines[0][1:] == ["40.0", "36.0", "4.0", "90.0 %", "10.0 %"]
    assert lines[3][1:] == ["40.0", "36.0", "4.0", "", ""]
    assert lines[9][1:] == ["60.0", "57.0", "-", "95.0 %", "-"]


def test_a_limit_of_detections_that_is_not_cocos_is_said():
    models = {"unmodified": measurement(50.0, [5.0])}
    about = dict(dataset="scenes", device="cpu", dtype="float32", plan=Plan().describe())
    assert "box AP  " in to_table(to_json(Comparison(models, 100), **about))
    content = to_json(Comparison(models, 500), **about)
    assert content["max_detections"] == 500
    assert "box AP (maxDets 500)" in to_table(content) and "box AP50 (maxDets 500)" in to_table(content)


def test_one_model_alone_is_compared_with_nothing():
    content = document(expedited=measurement(49.0, [5.0], 1.0, (64, 20)))
    assert "speedup" not in content and "retention" not in content and content["efficiency"] == 0.8
    assert "unmodified" not in to_table(content)
    assert "efficiency" not in document(unmodified=measurement(50.0, [5.0]))


def test_no_accuracy_gives_no_retention():
    content = document(unmodified=measurement(0.0, [5.0]), expedited=measurement(0.0, [5.0], 1.0, (64, 20)))
    assert content["retention"]["bbox.AP"] == {"ratio": None, "low": None, "high": None}


def test_the_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    content = document(unmodified=measurement(50.0, [5.0]))
    write_report(content, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "comparison.json").read_text()) == content
    assert "| box AP" in (folder / "comparison.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "comparison.md"]

    def full_disk(*_):
        raise OSError("no space left on device")

    before = (folder / "comparison.json").read_text()
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError):
        write_report({**content, "images": 7}, folder)
    assert (folder / "comparison.json").read_text() == before
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "comparison.md"]
