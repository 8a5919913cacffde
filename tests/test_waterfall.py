"""The table of what makes a model faster."""

import csv
import json
from functools import partial

import pytest
import torch

from hourglass import InputError, Plan, TokenClustering, calibrate, waterfall
from hourglass.evaluation import compare
from tests.detectors import Drawn, Several, in_batches, rows, tiny_vit

PLAN = Plan(TokenClustering((5, 4)), 1)
NAMES = [
    "unmodified",
    "fast attention",
    "bfloat16",
    "int8",
    "compiled",
    "plan",
    "fast attention, bfloat16",
    "fast attention, bfloat16, compiled",
    "plan, bfloat16",
    "plan, int8",
    "all: plan, bfloat16, compiled",
]


@pytest.fixture
def backend(monkeypatch):
    """What torch compiles with: graphs as they are, without a compiler of C++."""
    calls: list = []
    # What other tests compiled of the same code counts towards its limit, beyond which it runs as it is.
    torch._dynamo.reset()
    torch._logging.set_logs(recompiles=True)  # a count that is off is shown with its reasons

    def count(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compiling, backend=count))
    yield calls
    torch._logging.set_logs()
    torch._dynamo.reset()


def made(plan: Plan = PLAN, steps=None):
    torch.manual_seed(0)
    model = Several(tiny_vit()).eval()
    steps = waterfall.steps(plan) if steps is None else steps
    batches = in_batches(4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trials = waterfall.attempt(steps, model, batches[:1], "cpu")
    subjects = {
        step.name: step.subject(trial.view, Drawn([4.0, 2.0, 6.0, 8.0]))
        for step, trial in zip(steps, trials)
        if not trial.problem
    }
    comparison = compare(subjects, batches, warmup=1)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    views = [trial.view for trial in trials]
    return waterfall.to_json(steps, trials, comparison, plan, dataset="scenes", device="cpu"), views, batches


def test_each_part_alone_and_all_of_them_together(backend, tmp_path):
    document, views, batches = made()
    assert [row["name"] for row in document["rows"]] == NAMES
    assert document["images"] == 4 and document["batch_size"] == 2
    # Compiled once each, in the first runs: hooks that tell the time do not compile it anew.
    assert len(backend) == 3
    for row in document["rows"]:
        assert row["problem"] is None and row["accuracy"] == {"bbox.AP": 5.0}
        assert 0 < row["latency_ms"]["encoder"]["median"] < row["latency_ms"]["total"]["median"]
        assert row["retention"]["bbox.AP"] == {"ratio": 1, "low": 1, "high": 1}
    flags = {row["name"]: (row["attention"], row["dtype"], row["compiled"], row["plan"]) for row in document["rows"]}
    assert flags["unmodified"] == ("plain", "float32", False, False)
    assert flags["all: plan, bfloat16, compiled"] == ("fast", "bfloat16", True, True)
    with torch.no_grad():
        outputs = {name: view(batches[0])[0]["mean"] for name, view in zip(NAMES, views)}
    torch.testing.assert_close(outputs["compiled"], outputs["unmodified"])
    assert outputs["plan"] != outputs["unmodified"]
    for name, whole in (("int8", "unmodified"), ("plan, int8", "plan")):
        assert outputs[name] != outputs[whole]
        torch.testing.assert_close(outputs[name], outputs[whole], rtol=0.1, atol=0.1)

    waterfall.write_waterfall(document, tmp_path)
    assert json.loads((tmp_path / "waterfall.json").read_text()) == document
    with open(tmp_path / "waterfall.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == NAMES
    table = rows(waterfall.to_table(document, "github"))
    assert [line[0] for line in table] == NAMES and table[0][1:3] == ["5.0", ""]
    assert table[5][1:3] == ["5.0", "100.0 % (100.0-100.0)"]
    # Both hold the same figures, the table rounded.
    figures = ["accuracy.bbox.AP", "latency_ms.encoder.median", "images_per_second", "peak_memory_mb"]
    for line, cells in zip(lines, table):
        rounded = [f"{float(line[name]):.{digits}f}" for name, digits in zip(figures, (1, 1, 2, 0))]
        assert rounded == [cells[1], cells[3], cells[5], cells[7]]
    assert "box AP (maxDets 7) kept" in (tmp_path / "waterfall.md").read_text()


def test_a_calibrated_plan_runs_in_int8_too():
    """Its calibration is for the weights before they are rounded."""
    torch.manual_seed(0)
    model = Several(tiny_vit()).eval()
    plan = PLAN.calibrated(calibrate(model, PLAN, in_batches(4, 1)))
    steps = [step for step in waterfall.steps(plan) if step.name == "plan, int8"]
    (trial,) = waterfall.attempt(steps, model, in_batches(1, 1), "cpu")
    assert trial.problem == ""
    with torch.no_grad():
        model.encoder.blocks[1].mlp.fc1.weight.mul_(2)
    with pytest.raises(InputError, match="made for other weights"):
        steps[0].view(model)


def test_what_cannot_run_is_a_row_that_says_so(monkeypatch, tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nset CXX")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    document, *_ = made()
    torch._dynamo.reset()
    problems = {row["name"]: row["problem"] for row in document["rows"] if row["problem"]}
    assert list(problems) == [name for name in NAMES if "compiled" in name]
    assert all("RuntimeError: no compiler here" in problem for problem in problems.values())
    table = rows(waterfall.to_table(document, "github"))
    assert table[4][1] == "-" and table[4][-1].startswith("cannot run here: RuntimeError") and table[0][-1] == ""
    waterfall.write_waterfall(document, tmp_path)
    assert "no compiler here" in (tmp_path / "waterfall.csv").read_text()


def test_a_plan_that_leaves_no_token_out_has_no_rows():
    names = [step.name for step in waterfall.steps(Plan(attention="fast"))]
    assert names == [name for name in NAMES if "plan" not in name]
    assert "plan" in [step.name for step in waterfall.steps(Plan(keys=2))]


def test_what_the_unmodified_model_or_the_images_are_to_blame_for_is_no_row():
    model = Several(tiny_vit()).eval()
    steps = waterfall.steps(PLAN)[:2]
    with pytest.raises(KeyError):
        waterfall.attempt(steps, model, [[{"no image": 1}]], "cpu")

    def refuse(*_):
        raise InputError("an image that is too large")

    model.register_forward_pre_hook(refuse)
    with pytest.raises(InputError, match="too large"):
        waterfall.attempt(steps[1:], model, in_batches(2, 2), "cpu")


def test_int8_takes_a_cpu():
    with pytest.raises(InputError, match="the model must be on a CPU, as torch's int8 layers are, got meta"):
        waterfall.quantize(Several(tiny_vit()).to("meta"))


def test_without_quantisation_in_torch_the_rows_of_int8_say_so(monkeypatch):
    model = Several(tiny_vit()).eval()
    monkeypatch.delattr("torch.ao.quantization.quantize_dynamic")
    steps = [step for step in waterfall.steps(PLAN) if step.quantized]
    trials = waterfall.attempt(steps, model, in_batches(2, 2), "cpu")
    assert [step.name for step in steps] == ["int8", "plan, int8"]
    assert all(trial.view is None and "cannot import name 'quantize_dynamic'" in trial.problem for trial in trials)


def test_int8_layers_are_those_of_the_encoder_alone():
    model = Several(tiny_vit()).eval()
    view = waterfall.quantize(model)
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    left = [name for name, module in view.named_modules() if type(module) is torch.nn.Linear]
    encoder = next(name for name, module in model.named_modules() if type(module).__name__ == "ViT")
    assert linear and left == [name for name in linear if not name.startswith(encoder)]
