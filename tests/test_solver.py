import pytest
import torch
from torch import nn

from hourglass import InputError, Plan, SkipBlocks, expedite
from hourglass.encoders import SimpleFeaturePyramid, ViT
from hourglass.solver import layer_decay_params, layer_of


def tiny_model() -> nn.Module:
    model = nn.Module()
    vit = ViT(
        img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, use_rel_pos=True, residual_block_indexes=[1]
    )
    model.backbone = SimpleFeaturePyramid(vit, "last_feat", out_channels=8, scale_factors=(1.0,))
    model.head = nn.Linear(8, 2)
    return model


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[parameter]: group for group in groups for parameter in group["params"]}


def test_layers_are_numbered_from_the_image():
    layers = {
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "blocks.0.norm1.weight": 1,
        "blocks.11.attn.rel_pos_h": 12,
        "blocks.11.residual.conv1.weight": 13,
    }
    assert {name: layer_of(name, depth=12) for name in layers} == layers


@pytest.mark.parametrize("plan", [None, Plan(SkipBlocks(), 0, 1)], ids=["unmodified", "expedited"])
def test_learning_rate_falls_towards_the_image(plan):
    model = tiny_model() if plan is None else expedite(tiny_model(), plan)
    overrides = {"pos_embed": {"weight_decay": 0.0}}
    groups = by_name(
        model, layer_decay_params(model, base_lr=1.0, decay=0.5, weight_decay_norm=0.1, overrides=overrides)
    )
    rates = {
        "head.weight": 1.0,
        "backbone.simfp_3.0.weight": 1.0,
        "backbone.net.blocks.1.residual.conv1.weight": 1.0,
        "backbone.net.blocks.1.mlp.fc1.bias": 0.5,
        "backbone.net.blocks.0.attn.rel_pos_w": 0.25,
        "backbone.net.patch_embed.proj.weight": 0.125,
        "backbone.net.pos_embed": 0.125,
    }
    assert {name: groups[name]["lr"] for name in rates} == rates
    assert groups["backbone.net.pos_embed"]["weight_decay"] == 0.0
    assert groups["backbone.net.blocks.0.norm1.weight"]["weight_decay"] == 0.1
    assert "weight_decay" not in groups["head.weight"]


def test_an_optimizer_takes_the_groups():
    model = tiny_model()
    optimizer = torch.optim.AdamW(layer_decay_params(model, base_lr=0.1, decay=1.0), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * len(optimizer.param_groups)


@pytest.mark.parametrize("decay", [0, 1.5, -1])
def test_decay_out_of_range(decay):
    with pytest.raises(InputError, match="decay must be"):
        layer_decay_params(tiny_model(), base_lr=0.1, decay=decay)
