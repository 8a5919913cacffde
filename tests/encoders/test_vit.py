from functools import partial

import pytest
import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from hourglass.encoders.vit import SimpleFeaturePyramid, ViT
from tests.golden_cases import load, names, under


def build_vit(kwargs: dict) -> ViT:
    kwargs = dict(kwargs)
    return ViT(norm_layer=partial(nn.LayerNorm, eps=kwargs.pop("norm_eps")), **kwargs)


def inputs(tensors: dict) -> list[str]:
    return sorted(name.removesuffix("image") for name in tensors if name.endswith("/image"))


def parts_of_a_run(vit: ViT, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every map inside the ViT, under the golden files' names."""
    seen = {}
    modules = {"patch_embed": vit.patch_embed, **{f"block{i}": block for i, block in enumerate(vit.blocks)}}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        output = vit(image)
    return seen | output


@pytest.mark.parametrize("name", names("vit_"))
def test_vit_equals_detectron2s(name):
    case, tensors = load(name)
    vit = build_vit(case["kwargs"]).eval()
    vit.load_state_dict(under(tensors, "weights/"))
    for prefix in inputs(tensors):
        expected = under(tensors, prefix)
        parts = parts_of_a_run(vit, expected.pop("image"))
        for part in expected:
            torch.testing.assert_close(parts[part], expected[part], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", names("sfp_"))
def test_pyramid_equals_detectron2s(name):
    case, tensors = load(name)
    kwargs = dict(case["kwargs"])
    top_block = LastLevelMaxPool() if kwargs.pop("top_block") else None
    pyramid = SimpleFeaturePyramid(
        build_vit(kwargs.pop("net")), in_feature="last_feat", top_block=top_block, **kwargs
    ).eval()
    pyramid.load_state_dict(under(tensors, "weights/"))
    assert pyramid.padding_constraints["square_size"] == case["padding_constraints"]["square_size"]
    for prefix in inputs(tensors):
        with torch.no_grad():
            outputs = pyramid(tensors[prefix + "image"])
        levels = {part for part in under(tensors, prefix) if part.startswith("p")}
        assert set(outputs) == levels == set(pyramid.output_shape())
        for level in levels:
            torch.testing.assert_close(outputs[level], tensors[prefix + level], atol=1e-4, rtol=1e-4)
