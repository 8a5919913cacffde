"""The command, from end to end."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import OmegaConf
from PIL import Image

import hourglass.data.panoptic
import projects.demo
import train_net
from hourglass import InputError, TokenClustering, launch
from hourglass.evaluation.journal import read_records
from hourglass.search.options import Option
from hourglass.training import check_training
from tests.commands import read, refusal, run
from tests.models import SMALL, UNTRAINED
from tests.pages import check_page

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """A data set root with few images."""
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.setitem(projects.demo.DEMO_IMAGES, "train", 6)
        patch.setitem(projects.demo.DEMO_IMAGES, "val", 5)
        patch.setitem(projects.demo.DEMO_IMAGES, "search", 8)
        yield root


def test_the_demo(tmp_path, capsys):
    """The shipped weights, on a few images: the table, the document, and a control that falls behind."""
    run("--eval-only", "--control", f"train.output_dir={tmp_path}", "evaluation.max_images=4", "evaluation.warmup=0")
    content = read(tmp_path)
    assert content["schema"] == 4 and content["dataset"] == "hourglass_demo_val" and content["images"] == 4
    assert list(content["models"]) == ["unmodified", "fast attention", "expedited", "control", "linear control"]
    fast = content["models"]["fast attention"]
    unmodified, expedited, control = (content["models"][name] for name in ("unmodified", "expedited", "control"))
    for task in ("bbox", "segm"):
        assert set(unmodified["accuracy"][task]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
        assert unmodified["accuracy"][task]["AP"] > 20
        assert control["accuracy"][task]["AP"] < unmodified["accuracy"][task]["AP"]
    assert expedited["tokens"]["middle"] < expedited["tokens"]["full"] == unmodified["tokens"]["middle"]
    linear = content["models"]["linear control"]
    assert control["accuracy"]["segm"]["AP"] < linear["accuracy"]["segm"]["AP"]
    assert 0 < control["encoder_gflops"] < expedited["encoder_gflops"] < unmodified["encoder_gflops"]
    assert linear["tokens"] == control["tokens"]
    # The same model: at most a box changes its rank by a rounding.
    assert fast["accuracy"]["segm"]["AP"] == pytest.approx(unmodified["accuracy"]["segm"]["AP"], abs=0.2)
    assert content["fast_attention"]["retention"]["bbox.AP"]["ratio"] == pytest.approx(1, abs=0.005)
    assert fast["tokens"] == unmodified["tokens"]
    assert 0 < content["efficiency"] <= 1
    for key in ("retention", "control_retention", "linear_control_retention"):
        assert set(content[key]) == {"bbox.AP", "segm.AP"}
    for part in ("encoder", "total"):
        speedup = content["speedup"][part]
        assert 0 < speedup["low"] <= speedup["ratio"] <= speedup["high"]
    printed = capsys.readouterr().out
    assert "mask AP75" in printed and "expedited / unmodified" in printed
    assert "box AP" in (tmp_path / "comparison.md").read_text()


def test_a_calibrated_plan(tmp_path, capsys):
    """Written, taken by its name, and refused where it does not belong."""
    plan = ["plan.reducer.grid=[6,6]", "plan.start=2", "plan.stop=6", "plan.keys=1"]
    run("--calibrate", *plan, f"train.output_dir={tmp_path}", "search.images=3", "dataloader.test.num_workers=0")
    printed = capsys.readouterr().out
    path = tmp_path / "calibration.pth"
    assert "3 images of hourglass_demo_search" in printed and f"for plan.calibration={path}" in printed
    arguments = ["--eval-only", "evaluation.max_images=2", "evaluation.warmup=0", f"train.output_dir={tmp_path}"]
    run(*arguments, "--only", "expedited", *plan, f"plan.calibration={path}")
    assert "calibrated on 3 images of hourglass_demo_search" in capsys.readouterr().out
    content = read(tmp_path)["plan"]["calibration"]
    (stage,) = content["stages"]
    assert content["images"] == 3 and 0 < stage["left"] < stage["left without"]
    others = [plan[0], "plan.start=3", *plan[2:], f"plan.calibration={path}"]
    assert "start was 2, and is 3" in refusal(capsys, *arguments, *others)
    untrained = refusal(capsys, *arguments, *plan, f"plan.calibration={path}", "train.init_checkpoint=")
    assert "made for other weights" in untrained
    missing = refusal(capsys, *arguments, *plan, f"plan.calibration={tmp_path / 'none.pth'}")
    assert "none.pth cannot be read (FileNotFoundError" in missing
    assert "calibrate afterwards" in refusal(capsys, *plan, f"plan.calibration={path}", "train.expedite=true")


def test_a_search(tmp_path, monkeypatch, capsys):
    """From the shipped weights to a config that the comparison takes; another goal goes on from what was measured."""
    options = [Option(TokenClustering((side, side)), "window", (side / 16) ** 2) for side in (8, 12)]
    monkeypatch.setattr("hourglass.search.trace.make_options", lambda windows: options)
    monkeypatch.setattr("hourglass.search.run.ROUNDS", (2, 1))
    monkeypatch.setattr("hourglass.search.latency.ROUNDS", 1)
    found_in = ["search.images=8", "dataloader.test.num_workers=0", f"train.output_dir={tmp_path}"]
    run("--search", "keep=0.9", *found_in)
    printed = capsys.readouterr().out
    assert "round 1, " in printed and "Request for keep=0.9, on images of hourglass_demo_search:" in printed
    content = json.loads((tmp_path / "search.json").read_text())
    assert content["found"]["goal"] == "keep=0.9" and "rank 4, with labels" in content["results"]
    assert (tmp_path / "search.png").stat().st_size > 5000 and "| plan" in (tmp_path / "search.md").read_text()
    arguments = ["--eval-only", "--config-file", str(tmp_path / "plan.py"), "--only", "expedited"]
    run(*arguments, "evaluation.max_images=1", "evaluation.warmup=0", f"train.output_dir={tmp_path}")
    assert read(tmp_path)["plan"] == content["found"]["plan"]
    capsys.readouterr()

    monkeypatch.setattr("hourglass.search.run.measure_errors", None)  # it is known
    run("--search", "speed=1.2", "labels=none", *found_in)
    printed = capsys.readouterr().out
    assert "continuing with" in printed and "agreement alone" in printed and "mask AP kept" not in printed
    # A config that leaves evaluation and search at their defaults.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.py").write_text("from .configs.demo.vitdet import dataloader, model, plan, train\n")
    mine = ["--config-file", str(tmp_path / "mine.py"), "search.dataset=hourglass_demo_search"]
    run("--search", "speed=1000", *mine, *found_in, "evaluation.warmup=0")
    printed = capsys.readouterr().out
    assert "continuing with" in printed and "fast attention alone, which changes nothing" in printed
    cfg = LazyConfig.load(str(tmp_path / "plan.py"))
    assert cfg.plan.attention == "fast" and cfg.evaluation.warmup == 0 and cfg.search.images is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["keep=2"], "keep must be over 0 and under 1"),
        (["keep=0.9", "speed=2"], "either keep, such as keep=0.99, or speed, such as speed=2"),
        (["keep=0.9", "search.images=1"], "search.images must be a whole number of at least 2, got 1"),
        (["keep=0.9", "search.images=4"], "--search needs at least 2 images to fit, got 1"),
        (["keep=0.9", "search.dataset=unknown"], "'unknown'"),
        (["keep=0.9", "search.image=4"], "search.image"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_line(arguments, message, tmp_path, capsys):
    line = refusal(capsys, "--search", *arguments, f"train.output_dir={tmp_path}")
    assert message in line


def test_a_folder_of_images_without_labels(tmp_path, capsys):
    """Times and agreement; of an interrupted run too, as what was found is kept."""
    folder = tmp_path / "images"
    projects.demo.write_demo(folder, {"val": 2})
    arguments = ["--eval-only", "evaluation.warmup=0", f"train.output_dir={tmp_path / 'out'}"]
    run(*arguments, "--images", str(folder / "val"), "plan.reducer.grid=[8,8]")
    printed = capsys.readouterr().out
    assert "agreement, mask AP" in printed and "mask AP50" not in printed
    content = read(tmp_path / "out")
    assert content["images"] == 2 and content["models"]["expedited"]["accuracy"] == {}
    assert content["agreement"]["fast attention"]["segm.AP"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert 0 < content["agreement"]["expedited"]["segm.AP"]["ratio"] < 1
    assert "expedited,agreement.segm.AP" in (tmp_path / "out" / "comparison.csv").read_text()

    run(*arguments, "--agreement", "evaluation.max_images=2", "plan.reducer.grid=[8,8]")  # with labels
    assert "agreement, mask AP" in capsys.readouterr().out
    assert set(read(tmp_path / "out")["agreement"]) == {"fast attention", "expedited"}

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "1.jpg").write_bytes(b"no image")
    for path, message in (("none", "which is no folder"), ("empty", "without one"), ("torn", "1.jpg cannot be read")):
        assert message in refusal(capsys, *arguments, "--images", str(tmp_path / path))


def test_a_waterfall(tmp_path, monkeypatch, capsys):
    """Every part alone and all together, in a table, as JSON, CSV and Markdown."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr("hourglass.waterfall.IMAGES", 3)
    arguments = ["evaluation.batch_size=2", f"train.output_dir={tmp_path}"]
    run("--waterfall", *UNTRAINED, *arguments)
    content = json.loads((tmp_path / "waterfall.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert len(rows) == 11 and content["images"] == 3 and content["batch_size"] == 2
    assert not any(row["problem"] for row in rows.values())
    assert rows["compiled"]["accuracy"] == rows["unmodified"]["accuracy"]
    assert rows["plan"]["plan"] and rows["plan"]["speedup"]["total"]["ratio"] > 0
    assert rows["bfloat16"]["dtype"] == "bfloat16" and rows["bfloat16"]["images_per_second"] > 0
    printed = capsys.readouterr().out
    assert "11 rows, each of 3 images" in printed
    assert "3 images in batches of 2" in printed and "all: plan, bfloat16, compiled" in printed
    assert len((tmp_path / "waterfall.csv").read_text().splitlines()) == 12
    assert "| plan, bfloat16" in (tmp_path / "waterfall.md").read_text()
    line = refusal(capsys, "--waterfall", *UNTRAINED, *arguments, "evaluation.dtype=bfloat16")
    assert "with --waterfall, which has bfloat16 in rows of its own" in line
    with pytest.raises(SystemExit):
        train_net.parse(["--waterfall", "--eval-only", "--only", "expedited"])
    assert "--waterfall cannot be used with --eval-only and --only" in capsys.readouterr().err


def test_batches_have_the_figures_of_one_image_at_a_time(tmp_path):
    """To the last digit, with the demo's weights; of five images, so that the last batch is ragged."""
    documents = {}
    for size in (1, 2, 5):
        sized = [f"train.output_dir={tmp_path / str(size)}", f"evaluation.batch_size={size}", "evaluation.warmup=0"]
        run("--eval-only", "--only", "expedited", "dataloader.test.num_workers=0", *sized)
        documents[size] = read(tmp_path / str(size))
        assert documents[size]["images"] == 5 and documents[size]["batch_size"] == size
    figures = [content["models"]["expedited"]["accuracy"] for content in documents.values()]
    assert figures[0]["segm"]["AP"] > 20 and figures[0] == figures[1] == figures[2]


def test_a_report(tmp_path, capsys, monkeypatch):
    """Of the shipped weights: it adds up, what it names is there, and an interrupted run gives the same one."""
    plan = ["plan.reducer.grid=[6,6]", "plan.start=2", "plan.stop=6", "plan.keys=1"]  # it changes something
    arguments = ["--eval-only", "--report", *plan, "evaluation.max_images=3", "evaluation.warmup=0"]
    run(*arguments, f"train.output_dir={tmp_path}")
    printed = capsys.readouterr().out
    page = tmp_path / "report" / "index.html"
    assert f"written to {page}" in printed and "agreement" not in printed
    check_page(page)
    text = page.read_text()
    for model in ("unmodified", "expedited"):
        (count, parts) = re.search(rf"The {model} model has (\d+): ([^.]*)\.", text).groups()
        assert sum(map(int, re.findall(r"\d+", parts))) == int(count) > 0
    assert (tmp_path / "report" / "tokens.jpg").exists() and "windows of 16 x 16 tokens" in text
    assert "under 32" in text and "mask AP by class" in text

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hourglass.commands.make_page", interrupt)
        with pytest.raises(SystemExit):
            run(*arguments, f"train.output_dir={tmp_path}")
    shutil.rmtree(tmp_path / "report")
    run(*arguments, "--resume", f"train.output_dir={tmp_path}")  # nothing is run again
    losses = [re.findall(r"The (?:un|exp)\w+ model has [^.]*", page_text) for page_text in (text, page.read_text())]
    assert losses[0] == losses[1] and not (tmp_path / "journal").exists()


def test_a_report_of_a_folder_without_labels(tmp_path, capsys):
    folder = tmp_path / "images"
    projects.demo.write_demo(folder, {"val": 2})
    arguments = ["--eval-only", "--report", "evaluation.warmup=0", f"train.output_dir={tmp_path / 'out'}"]
    run(*arguments, "--images", str(folder / "val"), "plan.reducer.grid=[6,6]", "evaluation.report.score=0.1")
    check_page(tmp_path / "out" / "report" / "index.html")
    text = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "agreement, mask AP" in text and "right before" not in text
    assert any(f"<td>{name}</td>" in text for name in projects.demo.THINGS)  # classes keep their names


def test_a_report_of_panoptic_segments(tmp_path):
    options = [*PANOPTIC_UNTRAINED, f"train.output_dir={tmp_path}", "evaluation.report.images=2"]
    run("--eval-only", "--report", *options, "plan.reducer.grid=[2,2]", "evaluation.max_images=1")
    check_page(tmp_path / "report" / "index.html")
    text = (tmp_path / "report" / "index.html").read_text()
    assert "What the plan changes: instances" in text and "What the plan changes: panoptic segments" in text


def test_a_report_refuses_before_anything_runs(tmp_path, capsys, monkeypatch):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    assert "which is not a report" in refusal(capsys, "--eval-only", "--report", f"train.output_dir={tmp_path}")
    score = refusal(capsys, "--eval-only", "--report", "evaluation.report.score=2")
    assert "evaluation.report.score must be a number from 0 to 1, got 2" in score
    monkeypatch.setitem(sys.modules, "jinja2", None)
    line = refusal(capsys, "--eval-only", "--report", f"train.output_dir={tmp_path / 'other'}")
    assert line == "error: --report needs jinja2: pip install jinja2"
    for arguments in (["--report"], ["--eval-only", "--report", "--only", "expedited"]):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2


def test_one_task_at_a_time(capsys):
    for arguments in (["--search", "keep=0.9", "--eval-only"], ["--calibrate", "--eval-only"]):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        assert "only one of --eval-only, --calibrate and --search can be given" in capsys.readouterr().err
    for arguments in (["--eval-only", "--only", "expedited", "--agreement"], ["--images", "."]):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["plan.reducer=null"], "calibration needs a plan with a reducer"),
        (["plan.reducer._target_=hourglass.BipartiteMatching", "plan.reducer.r=8"], "which reduces anew in each block"),
        (["plan.reducer.restore_mode=features"], 'use restore_mode="update" where the reducer has it'),
        (["search.images=1"], "search.images must be a whole number of at least 2, got 1"),
        (["search.dataset=unknown"], "'unknown'"),
        (["search.datasets=unknown"], "search.datasets"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_line(overrides, message, tmp_path, capsys):
    line = refusal(capsys, "--calibrate", f"train.output_dir={tmp_path}", "search.images=2", *overrides)
    assert message in line
    assert not list(tmp_path.iterdir())


def test_without_images_to_fit_it_to_there_is_no_linear_control(tmp_path, capsys):
    run("--eval-only", "--control", *UNTRAINED, f"train.output_dir={tmp_path}", "search.dataset=unknown")
    assert "linear control" not in read(tmp_path)["models"]
    assert "warning: no linear control" in capsys.readouterr().err


def test_a_list_of_evaluators(tmp_path):
    config = tmp_path / "both.py"
    config.write_text(
        "from detectron2.config import LazyCall as L, LazyConfig\n"
        "from detectron2.evaluation import COCOEvaluator\n"
        f"demo = LazyConfig.load({str(launch.DEMO)!r})\n"
        "dataloader, evaluation, model, plan, train = (demo[key] for key in\n"
        "    ('dataloader', 'evaluation', 'model', 'plan', 'train'))\n"
        "dataloader.test.dataset.names = 'hourglass_demo_panoptic_val'\n"
        "dataloader.evaluator = [L(COCOEvaluator)(dataset_name='${dataloader.test.dataset.names}', tasks=[task],\n"
        "    use_fast_impl=False) for task in ('bbox', 'segm')]\n"
    )
    arguments = ["--eval-only", "--only", "unmodified", "evaluation.max_images=1", *UNTRAINED]
    run("--config-file", str(config), f"train.output_dir={tmp_path}", *arguments)
    content = read(tmp_path)
    assert content["dataset"] == "hourglass_demo_panoptic_val"
    assert list(content["models"]["unmodified"]["accuracy"]) == ["bbox", "segm"]


# The panoptic demo, small and untrained, so that it finds a few segments and none of them right.
PANOPTIC = [
    "--config-file",
    str(launch.CONFIGS / "demo" / "mask2former_panoptic.py"),
    "model.backbone.embed_dim=16",
    "model.backbone.num_heads=[1,1,1,1]",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.object_mask_threshold=0.05",
    "dataloader.test.num_workers=0",
    "evaluation.warmup=0",
    "evaluation.max_images=2",
]
PANOPTIC_UNTRAINED = [*PANOPTIC, "train.init_checkpoint="]


def test_instances_and_panoptic_quality_in_one_run(tmp_path, capsys):
    run("--eval-only", "--control", *PANOPTIC_UNTRAINED, f"train.output_dir={tmp_path}")
    content = read(tmp_path)
    assert list(content["models"]) == ["unmodified", "fast attention", "expedited", "control", "linear control"]
    for model in content["models"].values():
        assert set(model["accuracy"]) == {"panoptic_seg", "segm"}
        assert set(model["accuracy"]["panoptic_seg"]) == {
            f"{figure}{group}" for figure in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st")
        }
    assert content["retention"].keys() == {"panoptic_seg.PQ", "segm.AP"}
    # Of the stage that the plan is in: 64 windows of 8 x 8 tokens.
    tokens = {name: tuple(model["tokens"].values()) for name, model in content["models"].items()}
    assert tokens.pop("fast attention") == (4096, 4096)
    controls = {"control": (4096, 0), "linear control": (4096, 0)}
    assert tokens == {"unmodified": (4096, 4096), "expedited": (4096, 1024), **controls}
    printed = capsys.readouterr().out
    assert "PQ things" in printed and "mask AP75" in printed


def test_a_panoptic_model_trains(tmp_path):
    run(
        *PANOPTIC_UNTRAINED,
        f"train.output_dir={tmp_path}",
        "train.max_iter=1",
        "train.eval_period=0",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
    )
    # What it wrote is a checkpoint; one of another width is refused.
    weights = f"train.init_checkpoint={tmp_path}/model_final.pth"
    run("--eval-only", "--only", "unmodified", *PANOPTIC, weights, f"train.output_dir={tmp_path}/again")


@pytest.fixture
def panoptic_copy(tmp_path, datasets):
    """The demo's panoptic images as a data set of the user's own."""
    launch.load_config(PANOPTIC[1], [])
    folder = DatasetCatalog.get("hourglass_demo_panoptic_val") and datasets / "hourglass_demo"
    shutil.copytree(folder, tmp_path / "copy")
    annotations = tmp_path / "copy" / "annotations"
    hourglass.data.panoptic.register_panoptic(
        "panoptic_copy",
        tmp_path / "copy" / "val",
        annotations / "panoptic_val.json",
        annotations / "panoptic_val",
        annotations / "instances_val.json",
    )
    yield annotations
    DatasetCatalog.remove("panoptic_copy")
    MetadataCatalog.remove("panoptic_copy")


def test_wrong_panoptic_data_is_refused(panoptic_copy, tmp_path, capsys):
    arguments = ["--eval-only", "--only", "unmodified", *PANOPTIC_UNTRAINED, f"train.output_dir={tmp_path}/o"]
    arguments.append("dataloader.test.dataset.names=panoptic_copy")
    png = panoptic_copy / "panoptic_val" / "000000000001.png"
    content = png.read_bytes()
    Image.new("RGB", (512, 512), (200, 0, 0)).save(png)
    assert f"panoptic PNG {png} has 1 segment ids that its segments_info lacks, such as 200" in refusal(
        capsys, *arguments
    )
    png.unlink()
    assert f"1 of the 2 panoptic PNGs of data set 'panoptic_copy' are missing, such as {png}" in refusal(
        capsys, *arguments
    )
    png.write_bytes(content)
    (panoptic_copy / "panoptic_val.json").write_text("{}")
    assert "has no list 'annotations'" in refusal(capsys, *arguments)
    assert not (tmp_path / "o").exists()


def test_other_checkpoints_and_evaluators_are_refused(tmp_path, capsys):
    arguments = ["--eval-only", *PANOPTIC, f"train.output_dir={tmp_path}/o"]
    line = refusal(capsys, *arguments, f"train.init_checkpoint={launch.DEMO.parent / 'vitdet.pth'}")
    assert "does not fit the model" in line
    # No semantic ground truth.
    target = "dataloader.evaluator.0._target_=detectron2.evaluation.SemSegEvaluator"
    line = refusal(capsys, *arguments, "train.init_checkpoint=", target, "model.semantic_on=true")
    assert "dataloader.evaluator cannot be built for data set 'hourglass_demo_coloured_val'" in line


def test_an_output_that_is_no_folder_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").touch()
    line = refusal(capsys, "--eval-only", *PANOPTIC_UNTRAINED, f"train.output_dir={tmp_path}/file/results")
    assert "train.output_dir must be a folder that can be written to, got" in line


def test_missing_packages_are_said(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("projects")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "Mask2Former needs transformers: pip install scipy transformers" in refusal(capsys, "--eval-only", *PANOPTIC)


@pytest.mark.parametrize("side", ["unmodified", "expedited"])
def test_one_side_alone(tmp_path, side):
    run("--eval-only", "--only", side, f"train.output_dir={tmp_path}", "evaluation.max_images=2", *UNTRAINED)
    content = read(tmp_path)
    assert list(content["models"]) == [side] and "speedup" not in content
    assert content["models"][side]["tokens"] == {"full": 256, "middle": 256 if side == "unmodified" else 100}


def test_another_reducer_and_another_data_set_by_overrides(tmp_path, datasets):
    run(
        "--eval-only",
        "plan.reducer._target_=hourglass.AveragePooling",
        "dataloader.test.dataset.names=hourglass_demo_train",
        "evaluation.dtype=bfloat16",
        f"train.output_dir={tmp_path}",
        *UNTRAINED,
        "plan.reducer.grid=[4,4]",
        "plan.scope=window",
        "plan.start=3",
    )
    content = read(tmp_path)
    assert content["plan"] == {
        "reducer": {"name": "AveragePooling", "grid": [4, 4], "restore_mode": "update"},
        "start": 3,
        "stop": 8,
        "scope": "window",
        "proportional": True,
        "published": False,
        "attention": "fast",
    }
    assert content["dataset"] == "hourglass_demo_train" and content["images"] == 6 and content["dtype"] == "bfloat16"
    assert content["models"]["expedited"]["tokens"]["middle"] == 64


@pytest.mark.parametrize("expedite", ["true", "false"])
def test_training(tmp_path, expedite, capsys, caplog):
    arguments = [
        f"train.output_dir={tmp_path}",
        f"train.expedite={expedite}",
        "train.max_iter=2",
        "train.eval_period=1",
        "train.checkpointer.period=1",
        "train.log_period=1",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "evaluation.max_images=2",
        *UNTRAINED,
    ]
    run("--resume", *arguments)  # there is nothing yet
    printed = capsys.readouterr()
    assert printed.out.count("encoder latency") == 2
    assert f"nothing to resume, starting anew: {tmp_path} has no last_checkpoint" in caplog.text
    caplog.clear()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in metrics if "total_loss" in line]
    assert len(losses) >= 2 and torch.tensor(losses).isfinite().all()
    assert any("unmodified/bbox/AP" in line for line in metrics)
    weights = torch.load(tmp_path / "model_final.pth")["model"]

    # What it wrote is a checkpoint of the unmodified model, and training goes on from it.
    run("--resume", *[argument.replace("max_iter=2", "max_iter=3") for argument in arguments])
    again = torch.load(tmp_path / "model_final.pth")
    assert "nothing to resume" not in caplog.text and again["iteration"] == 2 and set(again["model"]) == set(weights)
    moved = [name for name in weights if not torch.equal(weights[name], again["model"][name])]
    assert any(name.startswith("backbone.net.blocks.5.") for name in moved)
    run("--eval-only", *UNTRAINED, f"train.init_checkpoint={tmp_path}/model_final.pth", f"train.output_dir={tmp_path}")


SELECTION = [
    "--config-file",
    str(launch.CONFIGS / "demo" / "vitdet_selection.py"),
    *(override for override in UNTRAINED if not override.startswith("plan.")),
]


def test_selectors_are_trained_beside_a_model_that_stays(tmp_path):
    """Then they are evaluated from the file that training wrote, and from the whole model's checkpoint."""
    training = ["dataloader.train.num_workers=0", "dataloader.train.total_batch_size=2", "train.max_iter=2"]
    training += ["evaluation.max_images=2", f"train.output_dir={tmp_path}"]
    run(*SELECTION, *training, "plan.reducer.selectors=random")
    figures = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("loss_selection" in line and {"kept/0", "kept/3"} <= set(line) for line in figures)
    selectors = torch.load(tmp_path / "reducer.pth", weights_only=True)
    assert {name.split(".")[1] for name in selectors if name.startswith("blocks")} == {"0", "1", "2", "3"}
    # The model was not trained: made anew from the same seed it has the same weights.
    model = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    cfg = launch.load_config(SELECTION[1], SELECTION[2:])
    train_net.seed_all_rng(cfg.train.seed)
    fresh = train_net.build(cfg, "model").state_dict()
    assert all(torch.equal(model[name], value) for name, value in fresh.items())
    assert set(model) - set(fresh) == {f"backbone.net.reducer.{name}" for name in selectors}

    tokens = []
    for name in ("reducer.pth", "model_final.pth"):
        folder = tmp_path / name[:5]
        options = [f"plan.reducer.selectors={tmp_path / name}", "evaluation.max_images=2", f"train.output_dir={folder}"]
        run("--eval-only", *SELECTION, *options)
        tokens.append(read(folder)["models"]["expedited"]["tokens"])
    assert tokens[0] == tokens[1] and 0 < tokens[0]["middle"] < tokens[0]["full"] == 256


def test_training_nothing_is_refused(tmp_path, capsys):
    training = ["train.max_iter=1", "train.trainable=reducer", f"train.output_dir={tmp_path}"]
    assert 'train.trainable="reducer" needs a reducer' in refusal(capsys, *UNTRAINED, *training)
    assert "train.trainable must be 'all' or 'reducer', got 'selectors'" in refusal(
        capsys, *UNTRAINED, *training, "train.trainable=selectors"
    )


def test_selectors_without_weights_are_refused(capsys):
    line = refusal(capsys, "--eval-only", *SELECTION, "plan.reducer.selectors=null")
    assert "selectors must be a file of trained selectors" in line
    assert "selectors none.pth cannot be read" in refusal(
        capsys, "--eval-only", *SELECTION, "plan.reducer.selectors=none.pth"
    )


def killed(command: list[str], folder: Path, images: int) -> None:
    """Run until so many images are finished, then kill the processes."""
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while sum(1 for path in folder.glob("journal/*/*.msgpack") for _ in read_records(path)) < images:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "comparison.json").exists()


def test_two_processes_that_are_killed_go_on_to_the_figures_of_one(tmp_path):
    arguments = ["--eval-only", "evaluation.max_images=5", "evaluation.warmup=0"]
    run(*arguments, f"train.output_dir={tmp_path}/one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train_net.py"]
    command = [*launcher, *arguments, f"train.output_dir={tmp_path}/two"]
    killed(command, tmp_path / "two", 2)
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starting anew" not in done.stderr and not (tmp_path / "two" / "journal").exists()
    first, second = read(tmp_path / "one"), read(tmp_path / "two")
    assert second["images"] == 5
    for name in ("unmodified", "fast attention", "expedited"):
        for key in ("accuracy", "tokens", "encoder_gflops"):
            assert second["models"][name][key] == first["models"][name][key]


def test_what_ran_is_what_is_evaluated(tmp_path):
    """A data set that has a part of the annotations' images, as a list of a user's own function."""
    DatasetCatalog.register("demo_part", lambda: DatasetCatalog.get("hourglass_demo_val")[1:3])
    metadata = MetadataCatalog.get("hourglass_demo_val")
    MetadataCatalog.get("demo_part").set(
        json_file=metadata.json_file,
        thing_classes=metadata.thing_classes,
        thing_dataset_id_to_contiguous_id=metadata.thing_dataset_id_to_contiguous_id,
    )
    arguments = ["--eval-only", "--only", "unmodified", "evaluation.warmup=0"]
    part = [*arguments, "dataloader.test.dataset.names=demo_part"]
    try:
        run(*part, f"train.output_dir={tmp_path}/part", f"dataloader.evaluator.output_dir={tmp_path}/predictions")
        run(*part, f"train.output_dir={tmp_path}/limited", "evaluation.max_images=2")
    finally:
        DatasetCatalog.remove("demo_part")
        MetadataCatalog.remove("demo_part")
    annotations = json.loads(Path(metadata.json_file).read_text())
    ids = [image["id"] for image in annotations["images"][1:3]]
    annotations["images"] = annotations["images"][1:3]
    annotations["annotations"] = [
        annotation for annotation in annotations["annotations"] if annotation["image_id"] in ids
    ]
    (tmp_path / "part.json").write_text(json.dumps(annotations))
    register_coco_instances("demo_alone", {}, str(tmp_path / "part.json"), metadata.image_root)
    try:
        run(*arguments, "dataloader.test.dataset.names=demo_alone", f"train.output_dir={tmp_path}/alone")
    finally:
        DatasetCatalog.remove("demo_alone")
        MetadataCatalog.remove("demo_alone")
    reports = [read(tmp_path / name) for name in ("alone", "limited", "part")]
    alone, limited, part = (report["models"]["unmodified"]["accuracy"] for report in reports)
    assert alone["bbox"]["AP"] > 20
    assert part == limited == alone
    # A folder for each model's predictions.
    assert (tmp_path / "predictions" / "unmodified" / "coco_instances_results.json").is_file()


def test_an_interruption_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hourglass.evaluation.InstanceEvaluator.process", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run("--eval-only", f"train.output_dir={tmp_path}/o", "evaluation.max_images=1", *UNTRAINED)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: 0 finished images are kept in ")
    assert not (tmp_path / "o").exists()


def test_an_interrupted_training_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_net, "train", interrupt)
    for message in ("no checkpoint was written yet", f"--resume goes on from the last checkpoint in {tmp_path}"):
        with pytest.raises(SystemExit) as stopped:
            run(f"train.output_dir={tmp_path}", *UNTRAINED)
        assert stopped.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == f"interrupted: {message}"
        (tmp_path / "last_checkpoint").write_text("model_0000009.pth")


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{tmp_path}/o")

    monkeypatch.setattr("hourglass.commands.write_report", full)
    line = refusal(capsys, "--eval-only", f"train.output_dir={tmp_path}/o", "evaluation.max_images=1", *UNTRAINED)
    assert line == f"error: {tmp_path}/o: No space left on device"
    # What was measured is there, for --resume.
    assert len(list(read_records(next((tmp_path / "o").glob("journal/*/*.msgpack"))))) == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["plan.strat=4"], "did you mean 'plan.start'?"),
        (["plan.start=3", "plan.stop=3"], "stop must be a whole number over start (3) or None, got 3"),
        (["plan=null"], "plan must be a hourglass.Plan, got None"),
        (["plan.reducer._target_=hourglass.AveragePoolng"], "'hourglass.AveragePoolng' cannot be imported"),
        (["model.roi_heads.num_clases=3"], "did you mean 'model.roi_heads.num_classes'?"),
        (["evaluation.warmup=two"], "evaluation.warmup must be a whole number of at least 0, got 'two'"),
        (["plan.stop=9"], "a plan needs 0 <= start < stop <= 8"),
        (["plan.reducer.grid=[65,64]"], "grid (65, 64) is larger than the token map, which has 16 x 16 tokens"),
        (["plan.reducer.grid=0"], "grid must be (rows, columns)"),
        (
            ["plan.reducer._target_=hourglass.TokenClustering", "plan.reducer.k=0"],
            "k must be a whole number of at least 1, got 0",
        ),
        (["train.init_checkpoint=missing.pth"], "checkpoint missing.pth cannot be read"),
        (
            ["dataloader.test.dataset.names=coco_2017_val"],
            "coco/annotations/instances_val2017.json is missing",
        ),
        (["dataloader.test.dataset.names=hourglass_demo_vl"], "did you mean 'hourglass_demo_val'?"),
        (["train.device=tpu"], 'train.device must be "cuda", "cpu" or "auto"'),
        (["evaluation.dtype=float8"], 'evaluation.dtype must be "float32" or "bfloat16"'),
        (["evaluation.max_images=0"], "evaluation.max_images must be a whole number of at least 1"),
        (["train.max_iter=0"], "train.max_iter must be a whole number of at least 1, got 0"),
        (["train.eval_period=often"], "train.eval_period must be a whole number of at least 0, got 'often'"),
        (["train.checkpointer.period=2.5"], "train.checkpointer.period must be a whole number of at least 1, got 2.5"),
        (["train.seed=-1"], "train.seed must be a whole number of at least 0, got -1"),
        (["train.amp.enabled=yes!"], "train.amp.enabled must be true or false, got 'yes!'"),
        (["train.expedite=1"], "train.expedite must be true or false, got 1"),
        (["train.clip_gradient=-1"], "train.clip_gradient must be a number over 0, got -1"),
        (["train.clip_gradient=nan"], "train.clip_gradient must be a number over 0, got nan"),
        (["train.init_checkpoint=3"], "train.init_checkpoint must be text, got 3"),
    ],
)
def test_refusals(tmp_path, capsys, overrides, message):
    output = tmp_path / "output"
    line = refusal(capsys, "--eval-only", f"train.output_dir={output}", *UNTRAINED, *overrides)
    assert message in line
    assert not output.exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimizer.lr=abc"], "optimizer.lr must be a number over 0, got 'abc'"),
        (["optimizer.lr=-1"], "optimizer.lr must be a number over 0, got -1"),
        (["optimizer.betas=abc"], "optimizer cannot be built"),
        (["optimizer.weight_decay=-1"], "optimizer cannot be built (ValueError: Invalid weight_decay value: -1)"),
        (["train.trainable=some"], "train.trainable must be 'all' or 'reducer', got 'some'"),
    ],
)
def test_training_options_are_refused_before_anything_is_written(tmp_path, capsys, overrides, message):
    line = refusal(capsys, f"train.output_dir={tmp_path}/o", "train.max_iter=1", *UNTRAINED, *overrides)
    assert message in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("key", ["optimizer", "optimizer.params", "lr_multiplier", "dataloader.train"])
def test_a_config_that_lacks_what_training_reads_is_refused(key):
    cfg = launch.load_config(str(launch.DEMO), [])
    parent, _, name = key.rpartition(".")
    del (OmegaConf.select(cfg, parent) if parent else cfg)[name]
    with pytest.raises(InputError, match=f"a config that is trained must have '{key}'"):
        check_training(cfg)


def test_the_homes_of_paths_are_those_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    cfg = launch.load_config(str(launch.DEMO), ["train.output_dir=~/out", "train.init_checkpoint=~/model.pth"])
    assert cfg.train.output_dir == f"{tmp_path}/out" and cfg.train.init_checkpoint == f"{tmp_path}/model.pth"
    cfg = launch.load_config(str(launch.DEMO), ["train.init_checkpoint=detectron2://a~b.pkl"])
    assert cfg.train.init_checkpoint == "detectron2://a~b.pkl"


def test_training_refuses_before_it_begins(tmp_path, capsys):
    output = tmp_path / "output"
    arguments = [f"train.output_dir={output}", *UNTRAINED]
    assert "is larger than the token map" in refusal(capsys, *arguments, "plan.reducer.grid=[17,16]")
    assert "coco/annotations" in refusal(capsys, *arguments, "dataloader.test.dataset.names=coco_2017_val")
    assert "coco/annotations" in refusal(capsys, *arguments, "dataloader.train.dataset.names=coco_2017_train")
    assert not output.exists()


def test_training_goes_on_where_nothing_is_found(tmp_path):
    """No detection at all: an AP of 0, of which there is no share."""
    run(
        f"train.output_dir={tmp_path}",
        "train.max_iter=1",
        "train.eval_period=1",
        "model.roi_heads.box_predictor.test_score_thresh=0.99",
        "dataloader.train.total_batch_size=1",
        "dataloader.train.num_workers=0",
        "evaluation.max_images=1",
        *UNTRAINED,
    )
    content = read(tmp_path)
    for model in content["models"].values():
        assert {task: metrics["AP"] for task, metrics in model["accuracy"].items()} == {"bbox": 0, "segm": 0}
    assert {name: share["ratio"] for name, share in content["retention"].items()} == {"bbox.AP": None, "segm.AP": None}


def test_figures_by_class_and_what_limits_them(tmp_path, capsys):
    limit = "model.roi_heads.box_predictor.test_topk_per_image=1"
    run("--eval-only", "--by-class", f"train.output_dir={tmp_path}", "evaluation.max_images=2", limit, *UNTRAINED)
    content, printed = read(tmp_path), capsys.readouterr()
    classes = content["models"]["expedited"]["by_class"]["segm.AP"]
    assert set(classes) == set(MetadataCatalog.get("hourglass_demo_val").thing_classes)
    classes_with_figures = {name for name, value in classes.items() if value is not None}
    assert classes_with_figures == {
        name
        for name, difference in content["difference_by_class"]["expedited"]["segm.AP"].items()
        if difference["low"] is not None
    }
    assert "mask AP by class" in printed.out and "expedited - unmodified" in printed.out
    assert "mask AP by class" in (tmp_path / "comparison.md").read_text()
    assert content["environment"]["versions"]["torch"] in printed.out
    (line,) = [line for line in content["warnings"] if "the 1 detections that the model gives at most" in line]
    assert "2 of 2 images have more objects" in line
    assert "model.roi_heads.box_predictor.test_topk_per_image=100 raises the limit" in line
    assert f"warning: {line}" in printed.err
    assert (tmp_path / "comparison.csv").read_text().startswith("model,figure,class,value,low,high\n")


def test_weights_that_are_not_finite_are_said(tmp_path, capsys):
    """Detectron2 drops the boxes that they give, so that nothing is found."""
    cfg = launch.load_config(str(launch.DEMO), UNTRAINED)
    weights = train_net.build(cfg, "model").state_dict()
    weights["roi_heads.box_predictor.bbox_pred.bias"].fill_(float("nan"))
    torch.save({"model": weights}, tmp_path / "model.pth")
    run("--eval-only", *SMALL, f"train.init_checkpoint={tmp_path}/model.pth", f"train.output_dir={tmp_path}")
    content = read(tmp_path)
    line = "1 of the model's weights are not finite, such as roi_heads.box_predictor.bbox_pred.bias"
    assert line in content["warnings"] and f"warning: {line}" in capsys.readouterr().err
    assert content["models"]["expedited"]["accuracy"]["bbox"]["AP"] == 0


def test_only_and_control_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--eval-only", "--only", "expedited", "--control")
    assert stopped.value.code == 2 and "--only runs one model" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    output = tmp_path / "output"
    line = refusal(capsys, "--eval-only", f"train.output_dir={output}", *SMALL)
    assert (
        "does not fit the model" in line and "patch_embed.proj.weight is (128, 3, 8, 8), not (128, 3, 32, 32)" in line
    )
    assert not output.exists()


def test_where_the_data_is_looked_for_is_said(capsys, monkeypatch, datasets):
    arguments = ["--eval-only", *UNTRAINED, "dataloader.test.dataset.names=coco_2017_val"]
    assert f"DETECTRON2_DATASETS is '{datasets}'" in refusal(capsys, *arguments)
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert "DETECTRON2_DATASETS is not set, so 'datasets' is read" in refusal(capsys, *arguments)


@pytest.fixture
def broken_copy(tmp_path, datasets):
    """The demo's images as a data set of the user's own, one of them cut short."""
    run("--eval-only", "--only", "unmodified", f"train.output_dir={tmp_path}/before", *UNTRAINED)
    shutil.copytree(datasets / "hourglass_demo" / "val", tmp_path / "images")
    image = tmp_path / "images" / "000000000002.jpg"
    image.write_bytes(image.read_bytes()[:1000])
    annotations = datasets / "hourglass_demo" / "annotations" / "instances_val.json"
    register_coco_instances("broken_copy", {}, str(annotations), str(tmp_path / "images"))
    yield image
    DatasetCatalog.remove("broken_copy")
    MetadataCatalog.remove("broken_copy")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(broken_copy, tmp_path, capsys, workers):
    arguments = [
        "--eval-only",
        *UNTRAINED,
        "dataloader.test.dataset.names=broken_copy",
        f"train.output_dir={tmp_path}/o",
    ]
    line = refusal(capsys, *arguments, f"dataloader.test.num_workers={workers}")
    assert f"image {broken_copy} cannot be read" in line
    broken_copy.unlink()
    assert f"1 of the 5 images of data set 'broken_copy' are missing, such as {broken_copy}" in refusal(
        capsys, *arguments
    )
    assert not (tmp_path / "o" / "comparison.json").exists()


def test_configs_that_are_none(tmp_path, capsys):
    assert "config file nowhere.py is missing" in refusal(capsys, "--eval-only", "--config-file", "nowhere.py")
    broken = tmp_path / "broken.py"
    broken.write_text("model = 1 / 0")
    assert "cannot be loaded (ZeroDivisionError" in refusal(capsys, "--eval-only", "--config-file", str(broken))
    broken.write_text("model = dict()")
    assert "has no 'dataloader'" in refusal(capsys, "--eval-only", "--config-file", str(broken))


def test_a_model_without_an_encoder_is_refused(tmp_path, capsys):
    config = tmp_path / "linear.py"
    config.write_text(
        "from torch import nn\nfrom detectron2.config import LazyCall as L, LazyConfig\n"
        f"demo = LazyConfig.load({str(launch.DEMO)!r})\n"
        "dataloader, evaluation, plan, train = demo.dataloader, demo.evaluation, demo.plan, demo.train\n"
        "model = L(nn.Linear)(in_features=2, out_features=2)\n"
    )
    line = refusal(capsys, "--eval-only", "--config-file", str(config))
    assert "a model to be expedited must have one encoder, a ViT" in line and "got Linear, which has none" in line


def test_the_command_line_says_what_it_takes():
    command = [sys.executable, "train_net.py", "--eval-only", "plan.strat=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: unknown key 'plan.strat'")
    helped = subprocess.run([sys.executable, "train_net.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0
    for option in ("--eval-only", "--config-file", "--control", "--only", "--resume", "--num-gpus", "key=value"):
        assert option in helped.stdout
