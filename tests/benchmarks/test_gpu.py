import torch

from benchmarks import gpu


def test_every_model_and_the_tests_are_run(tmp_path):
    steps = gpu.steps(gpu.parse(["--output", str(tmp_path)]))
    assert list(steps) == ["tests", *gpu.MODELS]
    for model in gpu.MODELS:
        assert {"--compile", "cuda", "bfloat16", model, str(tmp_path)} <= set(steps[model])


def test_without_a_device_it_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(gpu.parse(["--output", str(tmp_path / "gpu")])) == 2
    assert capsys.readouterr().err == "error: make gpu needs a CUDA device, and torch finds none\n"
    assert not (tmp_path / "gpu").exists()


def test_a_step_that_fails_does_not_stop_the_others(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands = {"first": ["-c", "print('one'); exit(3)"], "second": ["-c", "print('two')"]}
    monkeypatch.setattr(gpu, "steps", lambda args: commands)
    assert gpu.main(gpu.parse(["--output", str(tmp_path)])) == 1
    printed = capsys.readouterr().out
    assert "first: failed (exit code 3)" in printed and "second: done" in printed
    assert (tmp_path / "second.log").read_text() == "two\n"
