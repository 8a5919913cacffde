"""Loading a config for a command."""

import pytest
import torch

from hourglass.launch import DEMO, load_config

CONFIG = """
from detectron2.config import LazyConfig

cfg = LazyConfig.load({demo!r})
model, dataloader, plan = cfg.model, cfg.dataloader, cfg.plan
plan.calibration = {calibration!r}
"""


@pytest.mark.parametrize(
    "overrides, kept, reason",
    [
        ([], True, None),
        (["plan.attention=plain", "train.max_iter=3"], True, None),
        (["plan.start=1"], False, "plan.start makes another plan"),
        (["train.init_checkpoint="], False, "train.init_checkpoint may have other weights"),
        (["plan.attention=fast", "plan.reducer=null"], False, "plan.reducer makes another plan"),
        (["plan.reducer.grid=[9,9]"], False, "plan.reducer.grid makes another plan"),
        (["plan.calibration=null", "plan.start=1"], False, None),
    ],
)
def test_a_configs_calibration_is_left_out_under_another_plan(overrides, kept, reason, tmp_path, capsys):
    calibration, path = str(tmp_path / "calibration.pth"), tmp_path / "config.py"
    torch.save({}, calibration)
    path.write_text(CONFIG.format(demo=str(DEMO), calibration=calibration))
    cfg = load_config(str(path), overrides)
    assert cfg.plan.calibration == (calibration if kept else None)
    expected = f"warning: the config's plan.calibration is left out: {reason}, and --calibrate fits another\n"
    assert capsys.readouterr().err == (expected if reason else "")


def test_a_calibration_that_is_given_is_not_left_out(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(demo=str(DEMO), calibration="a.pth"))
    cfg = load_config(str(path), ["plan.start=1", "plan.calibration=b.pth"])
    assert cfg.plan.calibration == "b.pth" and not capsys.readouterr().err
