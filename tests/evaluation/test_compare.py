import csv
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
)
from detectron2.structures import ImageList
from torch import nn

from hourglass import AveragePooling, InputError, Plan, SkipBlocks, TokenClustering, calibrate, expedite
from hourglass.evaluation import (
    Subject,
    compare,
    describe,
    to_class_tables,
    to_json,
    to_table,
    to_text,
    write_report,
)
from hourglass.evaluation.compare import Comparison, Measurement, _resample
from hourglass.evaluation.cost import PeakMemory
from hourglass.evaluation.faults import describe_gaps, describe_limits, detection_limit
from hourglass.evaluation.instances import Crowding
from hourglass.evaluation.timing import Run
from tests.detectors import Detector, Drawn, Recorder, Several, images, in_batches, rows, tiny_vit


def subjects() -> dict[str, Subject]:
    torch.manual_seed(0)
    encoder = tiny_vit()
    plans = {"unmodified": Plan(), "expedited": Plan(TokenClustering((5, 4)), 1), "control": Plan(SkipBlocks(), 1)}
    models = {name: Detector(expedite(encoder, plan)).eval() for name, plan in plans.items()}
    return {name: Subject(model, model.encoder, Recorder()) for name, model in models.items()}


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
    whole_set = SimpleNamespace(imgs={0: {}, 1: {}, 2: {}})
    kinds = (LVISEvaluator, RotatedCOCOEvaluator, PascalVOCDetectionEvaluator)
    found = [(mixed := type(kind.__name__, (Recorder, kind), {})).__new__(mixed) for kind in kinds]
    found[0]._lvis_api = found[1]._coco_api = whole_set
    (tmp_path / "val.txt").write_text("0\n1\n2\n")
    found[2]._image_set_path = str(tmp_path / "val.txt")
    return found


@pytest.mark.parametrize("index", range(3))
def test_evaluators_of_a_whole_data_set_refuse_a_part_of_it(tmp_path, index):
    compared = subjects()
    text = index == 2  # Pascal VOC's ids are file names
    inputs = [[{**image[0], "image_id": str(i) if text else i}] for i, image in enumerate(images(3))]
    for name, subject in compared.items():
        compared[name] = subject._replace(evaluator=whole_set_evaluators(tmp_path)[index])
    with pytest.raises(InputError, match="evaluates all 3 images of its annotations, got 2"):
        compare(compared, inputs[:2])
    assert compare(compared, inputs).models["unmodified"].accuracy == {"bbox": {"AP": 3.0}}


def test_images_that_run_twice_or_are_not_annotated_are_refused():
    with pytest.raises(InputError, match="an image must be compared once, got 1 again"):
        compare(subjects(), [*images(2), images(2)[1]])
    with pytest.raises(InputError, match="an image to be compared must have an 'image_id', got \\['image'\\]"):
        compare(subjects(), [[{"image": torch.zeros(3, 64, 64)}]])
    compared = subjects()
    for subject in compared.values():
        subject.evaluator._coco_api = SimpleNamespace(imgs={0: {}, 1: {}})
    with pytest.raises(InputError, match="image 2 is not among the 2 images that the evaluator has"):
        compare(compared, images(3))


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


class ByClass(Drawn):
    """The mean over two classes, of which `worth` has what an image adds to each."""

    def resample_classes(self, weights):
        mean = weights @ self.worth / weights.sum(1)[:, None]
        return {"bbox.AP": {"disc": mean[:, 0], "square": mean[:, 1], "nowhere": np.full(len(weights), np.nan)}}


def test_differences_by_class_are_paired():
    compared = subjects()
    worths = {
        "unmodified": [[10.0, 60.0], [50.0, 40.0], [90.0, 50.0]],
        "expedited": [[6.0, 61.0], [46.0, 41.0], [86.0, 51.0]],
        "control": [[0.0, 0.0], [40.0, 0.0], [110.0, 0.0]],
    }
    for name, subject in compared.items():
        compared[name] = subject._replace(evaluator=ByClass(worths[name]))
    comparison = compare(compared, images(3))
    # The mean of the classes that have a figure.
    assert comparison.models["unmodified"].samples["bbox.AP"][0] == 50
    differences = comparison.difference_by_class("expedited")["bbox.AP"]
    assert differences["disc"] == (-4, -4, -4) and differences["square"] == (1, 1, 1)
    assert np.isnan(differences["nowhere"]).all()
    points, low, high = comparison.difference_by_class("control")["bbox.AP"]["disc"]
    assert points == 0 and low < 0 < high

    content = to_json(comparison, **ABOUT)
    assert content["models"]["expedited"]["by_class"]["bbox.AP"] == {"disc": 46, "square": 51, "nowhere": None}
    assert content["difference_by_class"]["expedited"]["bbox.AP"]["disc"] == {"points": -4, "low": -4, "high": -4}
    lines = rows(to_class_tables(content, "github"))
    assert lines == [
        ["disc", "50.0", "46.0", "50.0", "-4.0 (-4.0 to -4.0)"],
        ["square", "50.0", "51.0", "0.0", "+1.0 (+1.0 to +1.0)"],
    ]
    alone = to_json(Comparison({"control": comparison.models["control"]}), **ABOUT)
    assert rows(to_class_tables(alone, "github")) == [["square", "0.0"], ["disc", "50.0"]]


def test_classes_of_evaluators_that_cannot_be_resampled():
    """Detectron2's own give the figures of classes among the others, "AP-disc" or "IoU-sky"."""
    content = document(unmodified=segmentation(40.0, 60.0))
    assert content["models"]["unmodified"]["by_class"] == {}
    samples, classes = _resample(Recorder(), {"sem_seg": {"mIoU": 3.0, "IoU-sky": 3.0, "ACC-sky": 4.0}})
    assert samples == {} and classes == {"sem_seg.mIoU": {"sky": np.array([3.0])}}
    _, classes = _resample(Recorder(), {"bbox": {"AP": 4.0, "AP-a-b": 4.0, "AP50": 5.0}})
    assert classes == {"bbox.AP": {"a-b": np.array([4.0])}}
    single = measurement(4.0, [5.0])._replace(classes=classes)
    content = document(unmodified=single, expedited=single)
    assert content["difference_by_class"]["expedited"]["bbox.AP"]["a-b"] == {"points": 0, "low": None, "high": None}
    assert rows(to_class_tables(content, "github")) == [["a-b", "4.0", "4.0", "+0.0"]]


def test_figures_that_no_table_knows_are_reported():
    """AP of any task, with the retention of "AP", and nothing else of it."""
    metrics = {"bbox": {"AP": 50.0, "APr": 20.0, "AP-disc": 3.0}, "lines": {"AP": 40.0, "AP10": 30.0, "recall": 1.0}}
    content = document(
        unmodified=measurement(50.0, [5.0])._replace(accuracy=metrics, samples={}),
        expedited=measurement(50.0, [5.0])._replace(accuracy=metrics, samples={}),
    )
    assert content["models"]["expedited"]["accuracy"] == {
        "bbox": {"AP": 50.0, "APr": 20.0},
        "lines": {"AP": 40.0, "AP10": 30.0},
    }
    assert content["retention"].keys() == {"bbox.AP", "lines.AP"}
    labels = [line[0] for line in rows(to_table(content, "github"))]
    assert labels[:4] == ["box AP", "box APr", "lines AP", "lines AP10"]


class Broken(nn.Module):
    """Breaks the output of its encoder from the second call on."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.calls = encoder, 0

    def forward(self, x):
        self.calls += 1
        factor = float("nan") if self.calls > 1 else 1.0
        return {name: feature * factor for name, feature in self.encoder(x).items()}


def test_operations_are_counted_where_they_are_asked_for():
    compared = subjects()
    compared["expedited"] = compared["expedited"]._replace(counted=False)
    models = compare(compared, images(1), warmup=0).models
    assert models["unmodified"].encoder_gflops > 0 and math.isnan(models["expedited"].encoder_gflops)


def test_outputs_that_are_not_finite_are_said_by_model():
    compared = subjects()
    model = Detector(Broken(tiny_vit())).eval()
    compared["expedited"] = Subject(model, model.encoder, Recorder())
    comparison = compare(compared, images(3), warmup=0)
    assert comparison.models["expedited"].runs["finite"].tolist() == [True, False, False]
    assert comparison.warnings() == ["expedited: the encoder's output is not finite in 2 of 3 images"]


def test_no_hook_stays_behind():
    """Hooks of views are the encoder's own: they would add up from comparison to comparison."""
    compared = subjects()
    for _ in range(2):
        compare(compared, images(2), warmup=0)
    for subject in compared.values():
        for module in subject.encoder.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_calibration_that_is_held_back_is_said():
    """One of the images that it was fitted to, and one that is far brighter."""
    model = Detector(tiny_vit()).eval()
    plan = Plan(AveragePooling((4, 4)), 1)
    batches = images(6)
    plan = plan.calibrated(calibrate(model, plan, batches))
    view = expedite(model, plan)
    compared = {"expedited": Subject(view, view.encoder, Recorder())}
    annotated, strange = batches[:2]
    strange[0]["image"] = 60 * strange[0]["image"].float()
    comparison = compare(compared, [annotated, strange], warmup=0)
    assert comparison.models["expedited"].runs["corrected"].tolist() == [1.0, 0.0]
    (line,) = comparison.warnings()
    assert (
        "the calibration is held back in 1 of 2 images" in line and "(0 % of the correction is applied there)" in line
    )


def test_weights_that_are_not_finite_are_said_before_and_after(caplog):
    compared = subjects()
    with torch.no_grad():
        compared["control"].encoder.patch_embed.proj.bias[0] = torch.nan
    comparison = compare(compared, images(2))
    line = "1 of the model's weights are not finite, such as encoder.patch_embed.proj.bias"
    assert f"control: {line}" in caplog.text
    # The views share their weights, so that it is said of all of them at once.
    assert comparison.warnings() == [line, "the encoder's output is not finite in 2 of 2 images"]
    content = to_json(comparison, **ABOUT)
    assert content["warnings"] == comparison.warnings()


class CocoResults(COCOEvaluator):
    """Detectron2's own, of a data set of two objects, one of them small, and of results that are given."""

    def __init__(self, folder, detections):
        box = dict(category_id=1, iscrowd=0, segmentation=[[0, 0, 5, 0, 5, 5]])
        objects = [
            dict(box, id=1, image_id=0, bbox=[0, 0, 10, 10], area=100),
            dict(box, id=2, image_id=1, bbox=[0, 0, 100, 100], area=10_000),
        ]
        content = dict(images=[dict(id=i, width=200, height=200) for i in range(3)], annotations=objects)
        (folder / "truth.json").write_text(json.dumps(dict(content, categories=[dict(id=1, name="disc")])))
        MetadataCatalog.pop("coco_results", None)
        MetadataCatalog.get("coco_results").json_file = str(folder / "truth.json")
        super().__init__("coco_results", tasks=("bbox",), use_fast_impl=False)
        self.detections = detections

    def process(self, inputs, outputs):
        for record in inputs:
            instances = [dict(entry) for entry in self.detections if entry["image_id"] == record["image_id"]]
            self._predictions.append({"image_id": record["image_id"], "instances": instances})


def test_nothing_found_is_0_and_kept_0_percent_from_detectron2s_own_evaluator(tmp_path):
    right = [dict(image_id=0, category_id=1, bbox=[0, 0, 10, 10], score=0.9)]
    compared = subjects()
    for name, detections in (("unmodified", right), ("expedited", []), ("control", [])):
        compared[name] = compared[name]._replace(evaluator=CocoResults(tmp_path, detections))
    content = to_json(compare(compared, images(3)), **ABOUT)
    figures = {"AP": 0, "AP50": 0, "AP75": 0, "APs": 0, "APm": None, "APl": 0}
    assert content["models"]["expedited"]["accuracy"]["bbox"] == figures
    assert content["models"]["unmodified"]["accuracy"]["bbox"]["AP"] == pytest.approx(100 * 51 / 101)
    assert content["retention"]["bbox.AP"]["ratio"] == 0
    assert ["box AP", "50.5", "0.0", "0.0", "0.0 %", "0.0 %"] == rows(to_table(content, "github"))[0]
    # Of the image that has no object there is nothing to be found.
    content = to_json(compare(compared, images(3)[2:]), **ABOUT)
    assert content["models"]["expedited"]["accuracy"]["bbox"]["AP"] is None
    assert any("no figure of box AP" in line for line in content["warnings"])


def test_what_has_no_figure_is_said():
    nothing = {"bbox": {"AP": 0.0, "APs": float("nan")}, "segm": {"AP": float("nan")}}
    classes = {"bbox.AP": {"disc": np.zeros(1)}}
    assert describe_gaps(nothing, classes) == [
        "no figure of box APs: there is nothing of the kind to find",
        "no figure of mask AP: the evaluator gives none",
    ]
    assert describe_gaps({"bbox": {"AP": 0.0}}, classes) == []


def test_a_memory_that_the_system_does_not_tell_has_no_figure(monkeypatch):
    monkeypatch.setattr(PeakMemory, "read", lambda self: float("nan"))
    content = to_json(compare(subjects(), images(2)), **ABOUT)
    assert content["models"]["unmodified"]["peak_memory_mb"] is None
    assert ["peak memory, MB", "-", "-", "-"] in [line[:4] for line in rows(to_table(content, "github"))]


def several() -> dict[str, Subject]:
    compared = subjects()
    for name, subject in compared.items():
        model = Several(subject.encoder).eval()
        compared[name] = Subject(model, model.encoder, Recorder())
    return compared


def test_batches_and_a_ragged_last_one():
    compared = several()
    comparison = compare(compared, in_batches(5, 2), warmup=0)
    for name, measured in comparison.models.items():
        assert compared[name].evaluator.seen == [0, 1, 2, 3, 4]
        assert measured.runs["images"].tolist() == [2, 2, 1] and measured.batch_size == 2
        # Times are those of whole batches, tokens and operations those of an image (tables are computed once a batch).
        assert measured.timed["images"].tolist() == [2, 2] and measured.runs["size"].tolist() == [64, 64, 64]
        assert measured.images_per_second == pytest.approx(2000 / np.median(measured.runs["total"][:2]))
        assert measured.accuracy == {"bbox": {"AP": 5.0}}
    assert comparison.models["expedited"].runs["middle"].tolist() == [20, 20, 20]
    alone = compare(several(), in_batches(2, 1), warmup=0)
    for name, measured in alone.models.items():
        assert comparison.models[name].encoder_gflops == pytest.approx(measured.encoder_gflops, rel=0.01)
    content = to_json(comparison, **ABOUT)
    assert content["images"] == 5 and content["batch_size"] == 2
    labels = [line[0] for line in rows(to_table(content, "github"))]
    assert "total latency of a batch of 2, ms (p10-p90)" in labels and "peak memory of a batch of 2, MB" in labels
    assert "scenes, 5 images in batches of 2, cpu" in describe(content)
    assert comparison.warnings() == []


def test_a_ragged_batch_alone_is_timed():
    assert compare(several(), in_batches(3, 3), warmup=0).models["unmodified"].timed["images"].tolist() == [3]


class Padding(Several):
    """Pads as Detectron2's models do."""

    def __init__(self, encoder, multiple):
        super().__init__(encoder)
        self.size_divisibility = multiple

    def forward(self, inputs):
        padded = ImageList.from_tensors([record["image"] for record in inputs], self.size_divisibility)
        return super().forward([{"image": image} for image in padded.tensor])


@pytest.mark.parametrize("multiple, count", [(8, 2), (32, 1), (64, 0)])
def test_images_that_are_padded_further_than_alone_are_said(multiple, count):
    inputs = [
        [{"image": torch.randn(3, *size), "image_id": i} for i, size in enumerate([(64, 64), (32, 60), (40, 64)])],
        [{"image": torch.randn(3, 48, 64), "image_id": 3}],
    ]
    model = Padding(tiny_vit(), multiple).eval()
    comparison = compare({"unmodified": Subject(model, model.encoder, Recorder())}, inputs, warmup=0)
    line = (
        f"{count} of 4 images were padded to the size of a larger one in their batch, what is found in them may differ "
        "from evaluation.batch_size=1"
    )
    assert comparison.warnings() == ([line] if count else [])


def test_a_model_that_does_not_take_batches_is_refused():
    compared = subjects()  # it gives one output whatever it is given
    with pytest.raises(InputError, match="unmodified gave 1 outputs of a batch of 2 images"):
        compare(compared, in_batches(2, 2))
    # Nothing stays behind on the models.
    assert not any(subject.encoder._forward_hooks for subject in compared.values())
    with pytest.raises(InputError, match="an image must be compared once, got 0 again"):
        compare(several(), [in_batches(1, 1)[0] * 2])


def test_a_subject_of_a_type_of_its_own():
    compared = several()
    seen = {}
    for name, subject in compared.items():
        compared[name] = subject._replace(dtype=torch.bfloat16 if name == "expedited" else None)
        subject.model.register_forward_hook(
            lambda *_, name=name: seen.__setitem__(name, torch.is_autocast_enabled("cpu"))
        )
    compare(compared, images(2), warmup=0)
    assert seen == {"unmodified": False, "expedited": True, "control": False}


def test_models_are_left_in_the_mode_that_they_were_in():
    compared = subjects()
    compared["expedited"].model.train()
    compare(compared, images(1))
    assert compared["expedited"].model.training and compared["expedited"].encoder.training
    assert not compared["unmodified"].model.training


def measurement(ap: float, encoder: list[float], reduction: float = 0.0, tokens=(0, 0)) -> Measurement:
    runs = [Run(2 * time, time, reduction, *tokens, 64, preprocessing=time / 4) for time in encoder]
    return Measurement(
        accuracy={"bbox": {"AP": ap, "AP50": 60.0, "AP-disc": 3.0}, "segm": {"AP": float("nan")}},
        samples={"bbox.AP": np.array([ap, 0.8 * ap, ap])},
        runs={part: np.array([getattr(run, part) for run in runs]) for part in Run._fields},
        encoder_gflops=2.0,
        peak_memory_mb=100.0,
    )


ABOUT = dict(dataset="scenes", device="cpu", dtype="float32", plan=Plan(TokenClustering((5, 4)), 1).describe())


def document(**models) -> dict:
    return to_json(Comparison(models), **ABOUT)


def test_the_documents_figures_by_hand():
    content = document(
        unmodified=measurement(50.0, [10.0, 20.0, 30.0]),
        **{"fast attention": measurement(50.0, [8.0, 16.0, 24.0])},
        expedited=measurement(49.0, [5.0, 10.0, 15.0], reduction=1.0, tokens=(64, 20)),
        control=measurement(25.0, [1.0, 2.0, 3.0], tokens=(64, 0)),
    )
    assert content["schema"] == 4 and content["images"] == 3 and content["batch_size"] == 1
    assert content["models"]["unmodified"]["images_per_second"] == 1000 / 40
    assert content["plan"]["reducer"]["grid"] == [5, 4]
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
    parts = {part: times["median"] for part, times in unmodified["latency_ms"].items()}
    assert parts == {"preprocessing": 5.0, "encoder": 20.0, "rest": 15.0, "total": 40.0}
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

    lines = rows(to_table(content, "github"))
    labels = ["PQ", "SQ", "RQ", "PQ things", "SQ things", "RQ things", "PQ stuff", "SQ stuff", "RQ stuff", "mIoU"]
    assert [line[0] for line in lines[:11]] == [*labels, "preprocessing latency, ms (p10-p90)"]
    assert lines[0][1:] == ["40.0", "36.0", "4.0", "90.0 %", "10.0 %"]
    assert lines[3][1:] == ["40.0", "36.0", "4.0", "", ""]
    assert lines[9][1:] == ["60.0", "57.0", "-", "95.0 %", "-"]


def test_a_limit_of_detections_that_is_not_cocos_is_said():
    models = {"unmodified": measurement(50.0, [5.0])}
    assert "box AP  " in to_table(to_json(Comparison(models, 100), **ABOUT))
    content = to_json(Comparison(models, 500), **ABOUT)
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


FILES = ["comparison.csv", "comparison.json", "comparison.md"]


def test_the_report_is_written_into_a_new_folder(tmp_path):
    content = document(unmodified=measurement(50.0, [5.0]))
    folder = tmp_path / "new" / "folder"
    write_report(content, folder)
    assert json.loads((folder / "comparison.json").read_text()) == content
    assert "| box AP" in (folder / "comparison.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("files", range(len(FILES)))
@pytest.mark.parametrize("existing", [True, False])
def test_the_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch, existing, files):
    """The disk is full before the first file, the second or the third."""
    content = document(unmodified=measurement(50.0, [5.0]))
    if existing:
        write_report(content, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, moved = os.replace, []

    def full_disk(source, target):
        if len(moved) == files:
            raise OSError("no space left on device")
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError):
        write_report({**content, "images": 7}, tmp_path)
    assert len(moved) == files
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_figure_of_the_document_is_in_the_csv(tmp_path):
    model = measurement(50.0, [5.0])._replace(classes={"bbox.AP": {"disc, red": np.array([40.0, 30.0, 50.0])}})
    content = document(unmodified=model, expedited=model, control=model)
    write_report(content, tmp_path)
    with open(tmp_path / "comparison.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["model", "figure", "class", "value", "low", "high"]
    figures = {(line["model"], line["figure"], line["class"]): line for line in lines}
    assert len(figures) == len(lines)
    expected = {
        ("unmodified", "accuracy.bbox.AP", ""): ("50.0", "", ""),
        ("unmodified", "accuracy.segm.AP", ""): ("", "", ""),
        ("expedited", "accuracy.bbox.AP", "disc, red"): ("40.0", "", ""),
        ("expedited", "difference.bbox.AP", "disc, red"): ("0.0", "0.0", "0.0"),
        ("expedited", "retention.bbox.AP", ""): ("1.0", "1.0", "1.0"),
        ("control", "retention.bbox.AP", ""): ("1.0", "1.0", "1.0"),
        ("expedited", "speedup.encoder", ""): ("1.0", "1.0", "1.0"),
        ("expedited", "efficiency", ""): ("1.0", "", ""),
        ("control", "latency_ms.rest.median", ""): ("3.75", "", ""),
        ("control", "tokens.middle", ""): ("64.0", "", ""),
        ("control", "peak_memory_mb", ""): ("100.0", "", ""),
        ("control", "images_per_second", ""): ("100.0", "", ""),
    }
    for key, cells in expected.items():
        assert (figures[key]["value"], figures[key]["low"], figures[key]["high"]) == cells, key


def test_the_machine_is_in_the_document_and_below_the_table(tmp_path, monkeypatch):
    content = document(unmodified=measurement(50.0, [5.0]))
    environment = content["environment"]
    assert environment["device"] == "cpu" and environment["gpu"] is None and environment["driver"] is None
    assert environment["threads"] == torch.get_num_threads() and environment["cpu"]
    assert environment["versions"].keys() == {"hourglass", "detectron2", "torch", "torchvision", "numpy", "python"}
    text = to_text(content)
    assert text.index("peak memory") < text.index(f"torch {torch.__version__}") < text.index(environment["system"])
    environment.update(gpu="A GPU", cuda="12.4", driver="550.1")
    assert "A GPU (CUDA 12.4, driver 550.1), " in to_text(content)
    environment.update(driver=None)
    assert "A GPU (CUDA 12.4), " in to_text(content)


def test_warnings_are_in_the_report(tmp_path):
    warned = measurement(50.0, [5.0])._replace(warnings=("too many objects",))
    content = document(unmodified=warned, expedited=warned._replace(warnings=("too many objects", "slow")))
    write_report(content, tmp_path, by_class=True)
    assert content["warnings"] == ["too many objects", "expedited: slow"]
    assert "\nWarning: too many objects\n\nWarning: expedited: slow\n" in (tmp_path / "comparison.md").read_text()


class TestLimits:
    def crowding(self, *counts):
        return Crowding(*(np.array(values) for values in counts))

    def detector(self, most: int) -> nn.Module:
        model = nn.Module()
        model.roi_heads = nn.Module()
        model.roi_heads.box_predictor = nn.Module()
        model.roi_heads.box_predictor.test_topk_per_image = most
        return model

    def test_more_objects_than_are_evaluated(self):
        crowding = self.crowding([375, 101, 100, 500], [80, 80, 100, 9], [375, 101, 100, 50], [80, 80, 100, 9])
        (line,) = describe_limits(crowding, 100, "dataloader.evaluator", self.detector(500))
        assert line == (
            "2 of 4 images have more objects of a class than the 100 detections that are evaluated (up to 375): "
            "dataloader.evaluator.max_dets_per_image=400 raises the limit"
        )
        assert describe_limits(crowding, 400, "dataloader.evaluator", self.detector(500)) == []

    def test_more_detections_than_are_evaluated(self):
        crowding = self.crowding([3, 3], [300, 99], [3, 3], [101, 99])
        (line,) = describe_limits(crowding, 100, "dataloader.evaluator.1", self.detector(300))
        assert "1 of 2 images have more detections of a class than the 100" in line
        assert "dataloader.evaluator.1.max_dets_per_image=200" in line

    def test_detections_at_the_models_own_limit(self):
        crowding = self.crowding([150, 150, 99, 100], [100, 90, 100, 100], [60, 60, 60, 60], [50, 50, 50, 50])
        (line,) = describe_limits(crowding, 100, "dataloader.evaluator", self.detector(100))
        assert line == (
            "1 of 4 images have more objects than the 100 detections that the model gives at most (up to 150): "
            "model.roi_heads.box_predictor.test_topk_per_image=200 raises the limit"
        )

    def test_a_cascade_and_a_model_without_a_limit(self):
        model = self.detector(100)
        model.roi_heads.box_predictor = nn.ModuleList([nn.Module() for _ in range(3)])
        for i, predictor in enumerate(model.roi_heads.box_predictor):
            predictor.test_topk_per_image = 100 + i
        assert detection_limit(model) == ("model.roi_heads.box_predictors.2.test_topk_per_image", 102)
        assert detection_limit(nn.Linear(2, 2)) == ("", None)
