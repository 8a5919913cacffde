"""``train_net.py --predict``, from end to end, by a small model without training."""

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

import train_net
from tests.commands import refusal, run
from tests.models import UNTRAINED
from tests.predictions import write_video


def draw_image(path, size=(120, 160)) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.png", (120, 160)), ("b.jpg", (90, 300)), ("deep/a.png", (120, 160))):
        draw_image(tmp_path / "in" / name, size)
    return tmp_path / "in"


def test_images_a_video_and_what_cannot_be_read(folder, tmp_path, capsys):
    (folder / "text.png").write_text("no image")
    write_video(folder / "clip.mp4", 3)
    out = tmp_path / "out"
    # Overrides may follow the paths, and batches are of two.
    paths = [str(folder), str(folder / "gone.jpg")]
    with pytest.raises(SystemExit) as stopped:
        run(
            "--compare",
            "--output",
            str(out),
            "--score",
            "0.01",
            "--predict",
            *paths,
            *UNTRAINED,
            "evaluation.batch_size=2",
        )
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    skipped = [line for line in captured.out.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 2 and "text.png cannot be read" in skipped[0] and "gone.jpg is missing" in skipped[1]
    assert "skipped 2 of 6 files" in captured.out and "3 images and 3 frames of 1 video" in captured.out
    assert "clip.mp4: 3 frames, " in captured.out and "frames/s" in captured.out and "frame/s]" in captured.err
    drawn = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert drawn == {
        *("a.jpg", "b.jpg", "deep/a.jpg", "clip.mp4", "images.json", "predictions.json"),
        *("unmodified/images.json", "unmodified/predictions.json"),
    }
    # Beside each other, in the images' shapes.
    rows, columns = cv2.imread(str(out / "b.jpg")).shape[:2]
    assert columns > 1600 and columns / 2 > rows
    truth = COCO(str(out / "images.json"))
    assert [truth.imgs[i].get("frame") for i in sorted(truth.imgs)] == [None, None, None, 0, 1, 2]
    annotations = {name: truth.loadRes(str(out / name / "predictions.json")).anns for name in ("", "unmodified")}
    assert all(
        {entry["image_id"] for entry in entries.values()} == {1, 2, 3, 4, 5, 6} for entries in annotations.values()
    )
    assert min(entry["score"] for entry in annotations[""].values()) < 0.5
    assert [entry["score"] for entry in annotations[""].values()] != [
        entry["score"] for entry in annotations["unmodified"].values()
    ]


def test_good_files_alone_end_well(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--predict", str(folder / "a.png"), *UNTRAINED, f"train.output_dir={tmp_path / 'out'}")
    assert stopped.value.code == 0
    content = json.loads((tmp_path / "out" / "predictions" / "images.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [str(folder / "a.png")]
    assert len(content["categories"]) == 10 and "skipped" not in capsys.readouterr().out


def test_nothing_to_read_is_refused(folder, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out"), *UNTRAINED]
    (tmp_path / "empty").mkdir()
    assert "got none in" in refusal(capsys, "--predict", str(tmp_path / "empty"), *out)
    assert "gone.jpg is missing" in refusal(capsys, "--predict", "gone.jpg", *out)
    (folder / "text.png").write_text("no image")
    line = refusal(capsys, "--predict", str(folder / "text.png"), *out)
    assert "none of 1 files could be read" in line
    assert not list((tmp_path / "out").rglob("*.*"))


def test_what_it_does_not_take(folder, tmp_path, capsys, monkeypatch):
    draw_image(folder / "c.jpg")
    line = refusal(capsys, "--predict", str(folder), "--output", str(folder), *UNTRAINED)
    assert "would overwrite" in line and "b.jpg, which is one of the inputs" in line
    assert "--score must be a number from 0 to 1" in refusal(
        capsys, "--predict", str(folder), "--score", "2", *UNTRAINED
    )
    for arguments, message in (
        (["--predict", "a.png", "--eval-only"], "--predict cannot be used with --eval-only"),
        (["--compare"], "--output and --compare are for --predict"),
    ):
        with pytest.raises(SystemExit):
            train_net.parse(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "hourglass.prediction.run", None)
    with pytest.raises(ModuleNotFoundError):  # none of matplotlib's is no advice to install it
        run("--predict", str(folder), *UNTRAINED)


def test_paths_that_look_like_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_image(tmp_path / "v1.0=final.png")
    args = train_net.parse(["--predict", "v1.0=final.png", "deep/a.b=c.png", "train.device=cpu"])
    assert args.predict == ["v1.0=final.png", "deep/a.b=c.png"] and args.overrides == ["train.device=cpu"]
