import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "tools" / "learning_curve.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def metrics(tmp_path):
    lines = [{"iteration": i, "total_loss": 2.0 / (i + 1), "loss_mask": 1.0 / (i + 1)} for i in range(4)]
    path = tmp_path / "metrics.json"
    # Evaluations are lines of their own, without losses.
    path.write_text("\n".join(map(json.dumps, [*lines, {"iteration": 4, "segm/AP": 30.0}])))
    return path


def test_a_picture_of_the_losses(metrics, tmp_path):
    result = run(metrics, "--figures", "total_loss", "loss_mask", "--output", tmp_path / "curve.png")
    assert result.returncode == 0, result.stderr
    assert min(Image.open(tmp_path / "curve.png").size) > 200


@pytest.mark.parametrize("wrong", ["no file", "no JSON", "a list", "no such figure", "no folder", "no picture"])
def test_what_cannot_be_drawn_is_one_line(wrong, metrics, tmp_path):
    arguments = [metrics, "--output", tmp_path / "curve.png"]
    if wrong == "no file":
        arguments[0] = tmp_path / "other.json"
    elif wrong == "no JSON":
        metrics.write_text("iteration 1")
    elif wrong == "a list":
        metrics.write_text("[1]")
    elif wrong in ("no folder", "no picture"):
        arguments[2] = tmp_path / ("new/curve.png" if wrong == "no folder" else "curve.doc")
    else:
        arguments += ["--figures", "loss_box"]
    result = run(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert not (tmp_path / "curve.png").exists()
