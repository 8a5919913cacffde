import json

import pytest
import torch

from benchmarks import stacking
from hourglass import InputError
from hourglass.waterfall import UNMODIFIED


def run(folder, *options: str) -> dict:
    common = ["--model", "swin_t", "--size", "70", "--repeats", "2", "--device", "cpu", "--output", str(folder)]
    stacking.main(stacking.parse([*common, *options]))
    return json.loads((folder / "swin_t_70_cpu_stacking.json").read_text())


def test_every_row_is_timed_at_every_batch(tmp_path, monkeypatch, capsys):
    def broken(image):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda forward: broken)
    document = run(tmp_path, "--batches", "1", "3")
    for row in document["rows"]:
        if "compiled" in row["name"]:
            assert "no compiler here" in row["problem"] and row["batches"] == {}
            continue
        assert row["problem"] is None and list(row["batches"]) == ["1", "3"]
        for images, batch in row["batches"].items():
            assert batch["images_per_second"] == pytest.approx(1000 * int(images) / batch["latency_ms"]["median"])
            assert batch["speedup"]["low"] <= batch["speedup"]["ratio"] <= batch["speedup"]["high"]
    names = [row["name"] for row in document["rows"]]
    assert names[0] == UNMODIFIED and {"int8", "plan", "plan, bfloat16", "plan, int8"} <= set(names)
    printed = capsys.readouterr()
    assert "ms an image, batches of 3" in printed.out and "compiled cannot run here" in printed.err
    assert (tmp_path / "swin_t_70_cpu_stacking.md").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batches", "0"], "--batches must be a whole number of at least 1, got 0"),
        (["--batches", "2", "2"], "--batches must differ, got 2 2"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path, *options)
