"""What the README shows is run."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

import hourglass
from hourglass import InputError, Plan
from tests.encoders import test_hourglass_swin as of_swin
from tests.encoders.test_hourglass_vit import image, last, tiny_vit

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def strided():
    """The README's reducer of one's own."""
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Strided" in code)
    scope: dict = {}
    exec(block, scope)
    assert scope["plan"].describe()["reducer"] == {"name": "Strided", "stride": 2}
    return scope["Strided"]


def test_a_reducer_of_ones_own_is_short(strided):
    code = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Strided" in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("size", [(64, 64), (56, 104), (8, 8)], ids=str)
def test_a_reducer_of_ones_own_runs_in_every_encoder(strided, size):
    tokens = torch.randn(2, 5, 6, 3)
    reduction = strided()(tokens)
    assert reduction.tokens.shape == (2, 3, 3, 3)
    assert torch.equal(reduction.restore(reduction.tokens), tokens)
    torch.testing.assert_close(reduction.restore(reduction.tokens + 1), tokens + 1)

    vit, x = tiny_vit(), image(2, *size)
    for scope in ("map", "window"):
        out = last(hourglass.expedite(vit, Plan(strided(), 1, 4, scope=scope)), x)
        assert out.shape == last(vit, x).shape and out.isfinite().all()
    kept = last(hourglass.expedite(vit, Plan(strided(1), 1, 4)), x)
    torch.testing.assert_close(kept, last(vit, x), atol=1e-5, rtol=1e-5)
    swin = of_swin.tiny_swin()
    out = of_swin.run(hourglass.expedite(swin, Plan(strided(), 4, 8)), x)
    expected = of_swin.run(swin, x)
    assert all(out[name].shape == expected[name].shape for name in expected)


def test_a_panoptic_set_of_ones_own_is_registered():
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "register_panoptic" in code)
    try:
        exec(block, {})  # nothing is read yet
        metadata = MetadataCatalog.get("my_panoptic_val")
        assert metadata.panoptic_root == "annotations/panoptic_my_val"
        assert metadata.json_file == "annotations/my_val.json"
        with pytest.raises(InputError, match="panoptic JSON annotations/panoptic_my_val.json cannot be read"):
            DatasetCatalog.get("my_panoptic_val")
    finally:
        DatasetCatalog.remove("my_panoptic_val")
        MetadataCatalog.remove("my_panoptic_val")
