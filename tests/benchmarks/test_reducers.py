import json
from pathlib import Path

import pytest
import torch

import projects.demo
from benchmarks import reducers
from benchmarks.reducers import make_plans, merged_a_block, pareto_front, parse
from hourglass import BipartiteMatching, InputError, Plan, TokenClustering, reduction


@pytest.fixture(autouse=True)
def two_images(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(projects.demo.DEMO_IMAGES, "val", 2)
    monkeypatch.setitem(projects.demo.DEMO_IMAGES, "search", 8)


def test_the_budget_is_the_mean_over_blocks():
    for budget in (1.0, 0.6, 0.4, 0.25):
        reducer, remaining, total = BipartiteMatching(merged_a_block(budget, 256, 4)), 256, 0
        for _ in range(4):
            remaining = reducer.remaining(remaining, 256)
            total += remaining
        assert abs(total / (4 * 256) - budget) < 0.005


def test_the_front_is_what_nothing_beats():
    points = {"slow": (1.0, 1.0), "best": (2.0, 1.0), "fast": (3.0, 0.9), "worse": (2.5, 0.8), "same": (3.0, 0.9)}
    assert pareto_front(points) == {"best", "fast", "same"}


def test_every_reducer_has_a_plan_at_each_budget():
    default = Plan(TokenClustering((12, 12)), 3, 5, scope="window")
    selectors = str(Path(reducers.CONFIG).with_name("vitdet_selectors_{}.pth"))
    plans = make_plans([0.6, 0.4, 0.25], 16, 2, 6, default, selectors)
    assert list(plans)[:3] == ["unmodified", "fast attention", "the config's plan"]
    assert list(plans)[-1] == "blocks left out (control)" and plans["the config's plan"] is default
    kinds = {name.split(",")[0] for name in plans if "," in name}
    assert kinds == {
        "TokenClustering",
        "AveragePooling",
        "DensityPeaks",
        "GridMerging",
        "TokenClustering.published",
        "BipartiteMatching",
        "TokenSelection",
    }
    calibrated = {name.split(",")[0] for name in plans if name.endswith("calibrated")}
    assert calibrated == {"TokenClustering", "AveragePooling", "DensityPeaks", "GridMerging"}
    assert len(plans) == 7 + 3 * (len(kinds) + len(calibrated))
    assert plans["TokenClustering, 25 %"].reducer.grid == (8, 8)


def test_a_new_reducer_to_a_grid_is_measured_too(monkeypatch):
    class Another(TokenClustering):
        pass

    monkeypatch.setattr(reduction, "Another", Another, raising=False)
    plans = make_plans([0.25], 16, 2, 6, Plan())
    assert isinstance(plans["Another, 25 %"].reducer, Another) and "Another, 25 %, calibrated" in plans


def test_the_table_the_plot_and_the_document(tmp_path, capsys):
    """At one budget, on two images."""
    torch.manual_seed(0)
    options = ["--images", "2", "--budgets", "0.25", "--by", "file_name", "--sides", "48", "--device", "cpu"]
    reducers.main(parse([*options, "--output", str(tmp_path)]))
    document = json.loads((tmp_path / "reducers_cpu_float32.json").read_text())
    rows = document["models"]
    assert document["images"] == 2 and len(rows) == 18
    assert rows["unmodified"]["retention"]["bbox.AP"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert rows["fast attention"]["retention"]["segm.AP"]["ratio"] == pytest.approx(1.0, abs=0.01)
    for name, row in rows.items():
        assert row["speedup"]["low"] <= row["speedup"]["ratio"] <= row["speedup"]["high"]
        if "," in name:
            assert 0 < row["tokens"] < 0.5 and row["reduction_ms"] > 0 and row["encoder_gflops"] > 0
    assert rows["BipartiteMatching, 25 %"]["tokens"] == pytest.approx(0.25, abs=0.01)
    assert rows["blocks left out (control)"]["tokens"] == 0
    assert rows["an affine map in their place (control)"]["tokens"] == 0
    assert rows["TokenClustering, 25 %, calibrated"]["plan"]["calibration"]["images"] == 8
    parts = document["parts"]
    assert list(parts) == ["000000000001.jpg", "000000000002.jpg", "0 to 48 px", "over 48 px"]
    assert parts["000000000002.jpg"]["images"] == 1 and parts["0 to 48 px"]["objects"] > 0
    for part in parts.values():
        # There is no other sample of one image.
        end = None if part.get("images") == 1 else 1.0
        assert part["retention"]["unmodified"] in (
            {"ratio": 1.0, "low": end, "high": end},
            dict.fromkeys(["ratio", "low", "high"]),
        )
        assert part["accuracy"].keys() == rows.keys()
    assert any(row["front"]["bbox.AP"] for row in rows.values())
    assert (tmp_path / "reducers_cpu_float32.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(
        f"| {name} " in printed and f"| {name} " in (tmp_path / "reducers_cpu_float32.md").read_text() for name in rows
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "0"], "--images must be a whole number of at least 1, got 0"),
        (["--budgets", "0.5", "1.5"], r"--budgets must be shares of the tokens in \(0, 1\], got 1.5"),
        (["--images", "1", "--by", "stain"], "--by must be a key of the JSON's images, got 'stain': image 1 lacks it"),
        (["--output", "/dev/null/x"], "--output must be a folder that can be written to"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=message):
        reducers.main(parse(options))
