import json

import pytest

from benchmarks.encoder import main, parse
from hourglass import InputError


def run(folder, *options: str) -> dict:
    common = ["--model", "swin_t", "--size", "70", "--repeats", "2", "--device", "cpu", "--output", str(folder)]
    main(parse([*common, *options]))
    return json.loads((folder / "swin_t_70_cpu_float32.json").read_text())


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


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match="--size takes a whole number of at least 1, got 0"):
        main(parse(["--size", "0"]))


def test_an_output_that_is_no_folder_is_refused_before_measuring(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output takes a folder that can be written to, got '.*file/results'"):
        run(tmp_path / "file" / "results")
