import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hourglass import BipartiteMatching, Plan, Reduction, TokenClustering, expedite
from hourglass.encoders import ViT
from hourglass.evaluation.cost import count_gflops
from hourglass.evaluation.resampling import ratio_of_medians
from hourglass.evaluation.timing import Clock, Run, Stopwatch
from hourglass.reduction import SelectingReducer
from hourglass.reduction.windows import grid_positions
from tests.detectors import Detector, tiny_vit

INPUTS = [{"image": torch.zeros(3, 64, 64)}]


class Slow(TokenClustering):
    """Takes 30 ms to reduce and 20 ms to restore."""

    def forward(self, tokens):
        time.sleep(0.03)
        reduction = super().forward(tokens)

        def restore(refined):
            time.sleep(0.02)
            return reduction.restore(refined)

        return reduction._replace(restore=restore)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scope, grid", [("map", (5, 4)), ("window", (2, 2))])
def test_the_parts_of_a_run_are_told_apart(device, scope, grid):
    model = Detector(expedite(tiny_vit(), Plan(Slow(grid), 1, scope=scope)), idle=0.05).to(device)
    watch = Stopwatch(model, model.encoder, Clock(device))
    inputs = [{"image": INPUTS[0]["image"].to(device)}]
    outputs, run = watch.run(inputs)
    watch.run(inputs)  # what one run took is not added to the next
    outputs, again = watch.run(inputs)
    for timed in (run, again):
        assert timed.total >= timed.encoder + 50 and timed.encoder >= timed.reduction >= 50
        # The detector idles before its encoder.
        assert timed.preprocessing >= 50 and timed.rest >= 0 and timed.finite
        assert timed.preprocessing + timed.encoder + timed.rest == pytest.approx(timed.total)
        assert timed.reduction < 50 + 1000  # two sleeps, not those of every run so far
    middle = 20 if scope == "map" else 16
    assert (run.full, run.middle, run.size) == (64, middle, 64) == again[3:6]
    assert outputs[0]["features"]["last_feat"].shape == (1, 16, 8, 8)
    watch.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_views_of_one_model_are_timed_apart():
    """Hooks are shared between them, times are not."""
    model = Detector(tiny_vit(depth=3, window_block_indexes=(0, 1)))
    views = [expedite(model, plan) for plan in (Plan(), Plan(attention="fast"))]
    watches = [Stopwatch(view, view.encoder, Clock("cpu")) for view in views]
    for watch in watches:
        _, run = watch.run(INPUTS)
        assert len(watch._sums) == 1 and run.size == 64 and 0 < run.encoder < run.total
    assert len(watches[0]._sums) == 1
    model(INPUTS)
    assert [len(watch._sums) for watch in watches] == [1, 1]
    for watch in watches:
        watch.close()


def test_an_encoder_may_return_a_tensor():
    model = Detector(tiny_vit(depth=2, window_block_indexes=()))
    model.encoder.register_forward_hook(lambda module, inputs, features: features["last_feat"])
    watch = Stopwatch(model, model.encoder, Clock("cpu"))
    assert watch.run(INPUTS)[1].size == 64


class Halves(SelectingReducer):
    """Selects the tokens of the left half, then those of the left quarter; takes 10 ms to select and 5 to put back."""

    def forward(self, tokens, block):
        time.sleep(0.01)
        width = tokens.shape[2] // 2 ** (block + 1)
        left = tokens[:, :, :width]
        positions = grid_positions(left.shape[1:3], tokens.device).view(1, 1, -1, 2).float()

        def restore(refined):
            time.sleep(0.005)
            return torch.cat([refined.view_as(left), tokens[:, :, width:]], dim=2)

        return Reduction(left.reshape(1, 1, -1, tokens.shape[3]), positions, None, restore)


@pytest.mark.parametrize("device", DEVICES)
def test_reducers_that_act_in_each_block_are_counted_in_the_mean_over_blocks(device):
    inputs = [{"image": INPUTS[0]["image"].to(device)}]
    for plan, middle, least in (
        (Plan(BipartiteMatching(4), 1, scope="window"), (48 + 32) / 2, 0),
        (Plan(Halves(), 1), (32 + 16) / 2, 30),
    ):
        model = Detector(expedite(tiny_vit(depth=3, window_block_indexes=(0, 1)), plan)).to(device)
        watch = Stopwatch(model, model.encoder, Clock(device))
        watch.run(inputs)
        _, run = watch.run(inputs)
        assert (run.full, run.middle) == (64, middle)
        assert run.encoder >= run.reduction >= least and run.reduction > 0
        assert Run(*json.loads(json.dumps(run))) == run  # as a journal keeps it


def test_timing_leaves_the_output_as_it_is():
    model = Detector(expedite(tiny_vit(), Plan(TokenClustering((5, 4)), 1)))
    plain = model(INPUTS)[0]["features"]["last_feat"]
    watch = Stopwatch(model, model.encoder, Clock("cpu"))
    assert torch.equal(watch.run(INPUTS)[0][0]["features"]["last_feat"], plain)


def test_a_model_without_a_reducer_reduces_nothing():
    model = Detector(tiny_vit())
    _, run = Stopwatch(model, model.encoder, Clock("cpu")).run(INPUTS)
    assert run.reduction == run.full == run.middle == 0 and run.size == 64


def test_ratio_of_medians_and_its_interval():
    slow, fast = np.array([30.0, 40.0, 50.0]), np.array([10.0, 20.0, 30.0])
    interval = ratio_of_medians(slow, fast)
    assert interval.ratio == 2.0 and interval.low <= 2.0 <= interval.high
    assert interval == ratio_of_medians(slow, fast)
    # Where every image is exactly twice as fast there is nothing to be unsure of.
    assert ratio_of_medians(2 * fast, fast) == (2.0, 2.0, 2.0)


def test_gflops_by_hand():
    """
    One global block on 4 x 4 tokens of 8 channels, one head, no relative positions, patches of 4 x 4 x 3:
    embedding 16 * 48 * 8; qkv 16 * 8 * 24; scores and mixing 2 * 16 * 16 * 8; projection 16 * 8 * 8; MLP
    2 * 16 * 8 * 32; fvcore counts 5 operations an entry of a LayerNorm, of which there are 2 * 16 * 8.
    """
    vit = ViT(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1, use_abs_pos=False).eval()
    by_hand = 16 * 48 * 8 + 16 * 8 * 24 + 2 * 16 * 16 * 8 + 16 * 8 * 8 + 2 * 16 * 8 * 32 + 5 * 2 * 16 * 8
    assert count_gflops(vit, (torch.zeros(1, 3, 16, 16),)) * 1e9 == pytest.approx(by_hand)


def test_reducing_and_restoring_are_counted():
    vit = tiny_vit(depth=3, window_block_indexes=())
    x = (torch.zeros(1, 3, 64, 64),)
    unmodified = count_gflops(vit, x)
    assert count_gflops(expedite(vit, Plan()), x) == unmodified
    once, often = (count_gflops(expedite(vit, Plan(TokenClustering((4, 4), iterations=n), 1)), x) for n in (1, 3))
    assert once < often < unmodified
    # An iteration is two products of 64 tokens with 16 centres, of 16 channels each.
    assert (often - once) * 1e9 == pytest.approx(2 * 2 * 64 * 16 * 16)


class Fixed(nn.Module):
    """Gives what it is made of."""

    def __init__(self, **features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return self.features


@pytest.mark.parametrize("value, finite", [(1e4, True), (float("nan"), False), (float("-inf"), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_output_of_the_encoder_that_is_not_finite_is_noticed(value, finite, dtype):
    feature = torch.full((1, 4, 8, 8), 1e4, dtype=dtype)  # whose sum float16 does not hold
    feature[0, 1, 2, 3] = value
    model = Detector(Fixed(res2=torch.zeros(1, 4, 16, 16, dtype=dtype), res3=feature))
    watch = Stopwatch(model, model.encoder, Clock("cpu"))
    assert watch.run(INPUTS)[1].finite is finite
    model.encoder.features["res3"] = torch.zeros(1, 4, 8, 8)
    assert watch.run(INPUTS)[1].finite  # the next image's does not remember it


def test_cost_without_the_module_resource(monkeypatch, tmp_path):
    """Windows has none, and no /proc."""
    import hourglass.evaluation.cost as cost

    monkeypatch.setitem(sys.modules, "resource", None)
    try:
        importlib.reload(cost)
        assert cost.resource is None
        monkeypatch.setattr(cost, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
        monkeypatch.setattr(cost, "_STATUS", tmp_path / "none" / "status")
        memory = cost.PeakMemory("cpu")
        memory.reset()
        assert math.isnan(memory.read())
    finally:
        monkeypatch.undo()
        importlib.reload(cost)


def test_everything_is_imported_and_data_drawn_without_the_modules_of_unix(tmp_path):
    code = """
import sys
sys.modules.update(dict.fromkeys(("resource", "pwd", "grp", "termios")))
import hourglass, hourglass.evaluation, hourglass.evaluation.journal, train_net
from projects.demo import write_demo
sys.modules["fcntl"] = None  # which iopath's locks import, where there is one
write_demo(sys.argv[1], {"val": 1}, workers=1)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "val" / "000000000001.jpg").exists()


@pytest.mark.parametrize("platform, unit", [("darwin", 1), ("linux", 1024)])
def test_the_peak_of_the_process_is_in_the_systems_unit(monkeypatch, tmp_path, platform, unit):
    """macOS says bytes, others KiB."""
    import hourglass.evaluation.cost as cost

    usage = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=3_000_000), RUSAGE_SELF=0)
    (tmp_path / "status").write_text("Name: python\n")  # as sandboxes have it, without the peak
    monkeypatch.setattr(cost, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(cost, "resource", usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert cost.PeakMemory("cpu").read() == pytest.approx(3 * unit)


def test_peak_memory_sees_what_was_held():
    """In a process of its own: that of the tests may be told to give memory back meanwhile."""
    code = """
import torch
from hourglass.evaluation.cost import PeakMemory
for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
    memory = PeakMemory(device)
    memory.reset()
    before = memory.read()
    held = torch.ones(50_000_000, device=device)
    assert memory.read() - before > 150, (device, before, memory.read())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
