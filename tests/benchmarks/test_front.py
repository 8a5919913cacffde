"""The README's picture is drawn from what is committed, and the tables are of it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import front
from benchmarks.reducers import to_table
from hourglass import InputError

ROOT = Path(__file__).parents[2]


def test_it_is_drawn_for_light_and_dark_pages(tmp_path):
    front.main(front.parse(["--output", str(tmp_path)]))
    light, dark = (
        cv2.imread(str(tmp_path / f"front_{name}.png"), cv2.IMREAD_UNCHANGED).astype(float) for name in front.THEMES
    )
    assert light.shape == dark.shape and light.shape[2] == 4
    for picture, darker in ((light, True), (dark, False)):
        opaque = picture[..., 3] == 255
        assert 0.005 < opaque.mean() < 0.2  # the page shows through
        brightness = picture[opaque][:, :3].mean()
        assert brightness < 128 if darker else brightness > 128


def test_the_curve_is_calibrated_where_that_was_measured():
    rows = dict.fromkeys(["unmodified", "GridMerging, 60 %", "TokenClustering.published, 60 %", "DensityPeaks, 60 %"])
    assert front.find_curve(rows) == ["GridMerging, 60 %"]
    rows["GridMerging, 60 %, calibrated"] = None
    assert front.find_curve(rows) == ["GridMerging, 60 %, calibrated"]


def test_a_point_is_in_percent():
    row = {
        "tokens": 0.25,
        "speedup": {"ratio": 6.4},
        "retention": {"segm.AP": {"ratio": 0.94, "low": 0.9, "high": 0.98}},
    }
    assert front.to_point(row, "segm.AP") == pytest.approx((6.4, 94, 90, 98, 25))


def test_controls_and_bars_are_drawn(tmp_path):
    document = json.loads(front.FIGURES.read_text())
    row = document["models"][front.LEFT_OUT]
    front.draw(document, front.THEMES["light"], tmp_path / "one.png")
    document["models"][front.AFFINE] = {**row, "speedup": {**row["speedup"], "ratio": 7.0}}
    front.draw(document, front.THEMES["light"], tmp_path / "two.png")
    pictures = [cv2.imread(str(tmp_path / name), cv2.IMREAD_UNCHANGED) for name in ("one.png", "two.png")]
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("text", ["", "[]", '{"models": {}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "figures.json").write_text(text)
    with pytest.raises(InputError, match="figures takes the JSON of benchmarks.reducers"):
        front.main(front.parse([str(tmp_path / "figures.json"), "--output", str(tmp_path)]))


def test_the_pages_table_is_of_the_same_figures():
    assert to_table(json.loads(front.FIGURES.read_text())) in (ROOT / "docs" / "reducers.md").read_text()
