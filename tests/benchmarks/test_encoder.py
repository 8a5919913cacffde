import json
import math

import pytest
import torch

from benchmarks.encoder import main, parse
from hourglass import InputError


def run(folder, *options: str) -> dict:
    common = ["--model", "swin_t", "--size", "70", "--repeats", "2", "--device", "cpu", "--output", str(folder)]
    main(parse([*common, *options]))
    (document,) = folder.glob("*.json")
    return json.loads(document.read_text())


def test_encoders_are_timed_in_turn(tmp_path, capsys):
    document = run(tmp_path, "--published", "--no-memory")
    encoders = document["encoders"]
    assert list(encoders) == ["unmodified", "fast attention", "expedited", "control", "published"]
    assert encoders["unmodified"]["speedup"]["ratio"] == 1
    # What is counted does not depend on the machine. The third stage has 5 x 5 tokens here, reduced to 4 x 4.
    assert encoders["control"]["gflops"] < encoders["expedited"]["gflops"] < encoders["unmodified"]["gflops"]
    assert 0 < encoders["expedited"]["reduction_gflops"] < encoders["expedited"]["gflops"]
    # Tokens that fill cut windows are not projected.
    assert encoders["expedited"]["gflops"] < encoders["fast attention"]["gflops"] < encoders["unmodified"]["gflops"]
    assert encoders["unmodified"]["reduction_gflops"] == encoders["unmodified"]["reduction_ms"] == 0
    for figures in encoders.values():
        assert figures["latency_ms"]["p10"] <= figures["latency_ms"]["median"] <= figures["latency_ms"]["p90"]
        assert 0 < figures["efficiency"] <= 1 and figures["peak_memory_mb"] is None
    table = capsys.readouterr().out
    assert all(name in table for name in encoders) and (tmp_path / "swin_t_70_cpu_float32.md").is_file()


def test_the_plan_can_be_overridden(tmp_path):
    document = run(tmp_path, "plan.start=7", "plan.stop=8", "--repeats", "1", "--no-memory")
    assert (document["plan"]["start"], document["plan"]["stop"], document["repeats"]) == (7, 8, 1)


def test_a_calibrated_plan_and_pooled_keys(tmp_path):
    common = ["--model", "vitdet_b", "--size", "224", "--calibrated", "--repeats", "1", "--no-memory"]
    encoders = run(tmp_path, *common, "plan.stop=4", "plan.start=3", "plan.reducer.grid=[7,7]", "plan.keys=2")[
        "encoders"
    ]
    assert list(encoders)[3:] == ["control", "keys of 2 x 2 tokens", "expedited, calibrated"]
    assert encoders["keys of 2 x 2 tokens"]["gflops"] < encoders["fast attention"]["gflops"]
    assert encoders["expedited, calibrated"]["gflops"] > encoders["expedited"]["gflops"]


def test_bfloat16(tmp_path):
    document = run(tmp_path, "--dtype", "bfloat16", "--repeats", "1", "--no-memory")
    assert document["dtype"] == "bfloat16" and document["encoders"]["expedited"]["gflops"] > 0


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match="--size must be a whole number of at least 1, got 0"):
        main(parse(["--size", "0"]))


def test_an_output_that_is_no_folder_is_refused_before_measuring(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output must be a folder that can be written to, got '.*file/results'"):
        run(tmp_path / "file" / "results")


def test_scaling(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.encoder.SCALING_SIZES", (64, 96, 128))
    monkeypatch.setattr("benchmarks.encoder.SCORES_LIMIT_MB", 4e-6 * 12 * 7**4)  # of 6 x 6 tokens, not of 8 x 8
    on_the_map = ["plan.scope=map", "plan.reducer.grid=[46,46]"]
    main(parse(["--scaling", "--device", "cpu", "--repeats", "2", "--output", str(tmp_path), *on_the_map]))
    document = json.loads((tmp_path / "vitdet_b_scaling_cpu_float32.json").read_text())
    times = document["median_ms"]
    assert list(times["reducing and restoring"]) == list(times["global block"]) == ["16", "36", "64"]
    assert list(times["global block, plain formula"]) == ["16", "36"]
    line = times["global block, plain formula"]
    slope = math.log(line["36"] / line["16"]) / math.log(36 / 16)
    assert document["exponents"]["global block, plain formula"] == pytest.approx(slope)
    assert (tmp_path / "vitdet_b_scaling_cpu_float32.png").stat().st_size > 1000
    assert "exponent" in (tmp_path / "vitdet_b_scaling_cpu_float32.md").read_text()


def test_scaling_takes_a_vit():
    with pytest.raises(InputError, match="--scaling needs a ViT's model, got swin_t"):
        main(parse(["--scaling", "--model", "swin_t", "--device", "cpu"]))
    merging = ["plan.reducer._target_=hourglass.BipartiteMatching", "plan.scope=window"]
    for overrides in (["plan.reducer=null"], ["plan.scope=window", "plan.reducer.grid=[10,10]"], merging):
        with pytest.raises(InputError, match="--scaling needs a plan with a reducer that makes one smaller map"):
            main(parse(["--scaling", "--device", "cpu", *overrides]))


def test_an_encoder_that_cannot_be_compiled_is_left_out(tmp_path, monkeypatch, capsys):
    def no_compiler(encoder):
        def run(image):
            raise RuntimeError("no working C++ compiler\nand a trace")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    document = run(tmp_path, "--compile", "--no-memory", "--repeats", "1")
    assert list(document["encoders"]) == ["unmodified", "fast attention", "expedited", "control"]
    assert "warning: expedited, compiled: left out, RuntimeError: no working C++ compiler" in capsys.readouterr().err


def test_compiled_encoders_have_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda encoder: encoder)
    encoders = run(tmp_path, "--compile", "--no-memory", "--repeats", "1")["encoders"]
    assert encoders["expedited, compiled"]["reduction_ms"] == 0 and encoders["expedited"]["reduction_ms"] > 0
    assert encoders["fast attention, compiled"]["gflops"] is None


def test_a_reducer_that_acts_in_each_block_has_its_row(tmp_path):
    options = ["--size", "128", "--repeats", "1", "--device", "cpu", "--no-memory", "--output", str(tmp_path)]
    overrides = ["plan.reducer._target_=hourglass.BipartiteMatching", "plan.reducer.r=0.1", "plan.scope=window"]
    main(parse([*options, *overrides, "plan.start=9"]))
    expedited = json.loads((tmp_path / "vitdet_b_128_cpu_float32.json").read_text())["encoders"]["expedited"]
    assert expedited["reduction_ms"] > 0 and expedited["gflops"] > 0 and expedited["reduction_gflops"] is None


def test_parts_are_compared_on_the_same_input(tmp_path):
    options = ["--size", "128", "--repeats", "1", "--device", "cpu", "--no-memory", "--output", str(tmp_path)]
    main(
        parse(
            [
                *options,
                "plan.reducer.grid=[6,6]",
                "plan.start=11",
                "plan.stop=12",
                "plan.scope=map",
                "plan.reducer.grid=[4,4]",
            ]
        )
    )
    parts = json.loads((tmp_path / "vitdet_b_128_cpu_float32.json").read_text())["parts"]
    assert list(parts) == ["attention of a global block", "reducing and restoring"]
    assert all(part["difference"] < 1e-4 and part["speedup"]["ratio"] > 0 for part in parts.values())
