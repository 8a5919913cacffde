import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from hourglass import Plan, expedite
from hourglass.encoders import find_encoder
from hourglass.encoders.registry import family_of

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = sorted(path for path in CONFIGS.glob("*/*.py") if path.parent.name != "common")
VITDET = {
    f"{kind}_{size}": f"{golden}_keys_{size}"
    for kind, golden in (("mask_rcnn", "vitdet"), ("cascade_mask_rcnn", "vitdet_cascade"))
    for size in "blh"
}


def load(path: Path):
    return LazyConfig.load(str(path))


def meta_model(cfg):
    with torch.device("meta"):
        return instantiate(cfg.model)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_loads(path):
    assert load(path)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_is_complete(path):
    cfg = load(path)
    parts = {"dataloader", "evaluation", "lr_multiplier", "model", "optimizer", "plan", "train"}
    assert parts <= set(cfg)
    cfg.optimizer.params.model = model = meta_model(cfg)
    optimizer = instantiate(cfg.optimizer)
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == len(list(model.parameters()))
    multiplier = instantiate(cfg.lr_multiplier)
    assert 0 < multiplier(0.0) <= 1 and 0 < multiplier(0.1) <= 1
    assert multiplier(1 - 1 / cfg.train.max_iter) < 0.1


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_plan_fits_the_encoder(path):
    cfg = load(path)
    plan = instantiate(cfg.plan)
    assert isinstance(plan, Plan)
    _, encoder = find_encoder(meta_model(cfg))
    assert plan.blocks(sum(len(stage) for stage in family_of(encoder).stages(encoder)))
    assert expedite(encoder, plan)


@pytest.mark.parametrize("name", VITDET)
def test_vitdet_is_the_published_model(name):
    cfg = load(CONFIGS / "vitdet" / f"{name}.py")
    golden = json.loads((CONFIGS.parent / "tests" / "golden" / f"{VITDET[name]}.json").read_text())
    model = meta_model(cfg)

    entries = golden["state_dict"]
    expected = {entry["name"]: (entry["shape"], entry["dtype"]) for entry in entries}
    parameters = {entry["name"] for entry in entries if entry["kind"] == "parameter"}
    tensors = model.state_dict()
    assert {key: (list(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()} == expected
    assert {key for key, _ in model.named_parameters()} == parameters
    buffers = {key: list(buffer.shape) for key, buffer in model.named_buffers() if key not in tensors}
    assert buffers == dict(golden["non_persistent_buffers"])

    # What no shape tells.
    net = cfg.model.backbone.net
    for key, value in golden["vit_kwargs"].items():
        assert net[key] == value, key
    assert cfg.train.init_checkpoint.startswith(f"detectron2://ViTDet/COCO/{name.replace('rcnn', 'rcnn_vitdet')}/")
