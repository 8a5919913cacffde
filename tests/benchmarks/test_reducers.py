import json

import pytest
import torch

import hourglass.data
from benchmarks import reducers
from benchmarks.reducers import make_plans, merged_a_block, pareto_front, parse
from hourglass import BipartiteMatching, InputError


@pytest.fixture(autouse=True)
def two_images(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(hourglass.data.DEMO_IMAGES, "val", 2)


def test_the_budget_is_the_mean_over_blocks():
    for budget in (1.0, 0.6, 0.4, 0.25):
        reducer, left, total = BipartiteMatching(merged_a_block(budget, 256, 4)), 256, 0
        for _ in range(4):
            left = reducer.left(left, 256)
            total += left
        assert abs(total / (4 * 256) - budget) < 0.005


def test_the_front_is_what_nothing_beats():
    points = {"slow": (1.0, 1.0), "best": (2.0, 1.0), "fast": (3.0, 0.9), "worse": (2.5, 0.8), "same": (3.0, 0.9)}
    assert pareto_front(points) == {"best", "fast", "same"}


def test_every_reducer_has_a_plan_at_each_budget():
    plans = make_plans([0.6, 0.4, 0.25], 16, 4)
    assert list(plans)[:2] == ["unmodified", "fast attention"] and list(plans)[-1] == "blocks left out (control)"
    kinds = {name.split(",")[0] for name in plans if "," in name}
    assert kinds == {
        "TokenClustering",
        "AveragePooling",
        "DensityPeaks",
        "TokenClustering.published",
        "BipartiteMatching",
        "TokenSelection",
    }
    assert len(plans) == 3 + 3 * len(kinds)
    assert plans["TokenClustering, 25 %"].reducer.grid == (8, 8)


def test_the_table_the_plot_and_the_document(tmp_path, capsys):
    """At one budget, on two images."""
    torch.manual_seed(0)
    reducers.main(parse(["--images", "2", "--budgets", "0.25", "--device", "cpu", "--output", str(tmp_path)]))
    document = json.loads((tmp_path / "reducers_cpu_float32.json").read_text())
    rows = document["models"]
    assert document["images"] == 2 and len(rows) == 9
    assert rows["unmodified"]["retention"]["bbox"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert rows["fast attention"]["retention"]["segm"]["ratio"] == pytest.approx(1.0, abs=0.01)
    for name, row in rows.items():
        assert row["speedup"]["low"] <= row["speedup"]["ratio"] <= row["speedup"]["high"]
        if "," in name:
            assert 0 < row["tokens"] < 0.5 and row["reduction_ms"] > 0 and row["encoder_gflops"] > 0
    assert rows["BipartiteMatching, 25 %"]["tokens"] == pytest.approx(0.25, abs=0.01)
    assert rows["blocks left out (control)"]["tokens"] == 0
    assert any(row["front"]["bbox"] for row in rows.values())
    assert (tmp_path / "reducers_cpu_float32.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(
        f"| {name} " in printed and f"| {name} " in (tmp_path / "reducers_cpu_float32.md").read_text() for name in rows
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "0"], "--images takes a whole number of at least 1, got 0"),
        (["--budgets", "0.5", "1.5"], r"--budgets takes shares of the tokens in \(0, 1\], got 1.5"),
        (["--output", "/dev/null/x"], "--output takes a folder that can be written to"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=message):
        reducers.main(parse(options))
