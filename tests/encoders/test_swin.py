import pytest
import torch

from hourglass import InputError
from hourglass.encoders import Swin
from tests.golden_cases import load, names, under

RES = ("res2", "res3", "res4", "res5")


def inputs(tensors: dict) -> list[str]:
    return sorted(name.removesuffix("image") for name in tensors if name.endswith("/image"))


@pytest.mark.parametrize("name", names("swin_"))
def test_swin_equals_detectron2s_and_mask2formers(name):
    case, tensors = load(name)
    swin = Swin(**case["kwargs"], out_names=RES).eval()
    swin.load_state_dict(under(tensors, "weights/"))
    assert inputs(tensors)
    for prefix in inputs(tensors):
        expected = under(tensors, prefix)
        with torch.no_grad():
            outputs = swin(expected.pop("image"))
        assert outputs.keys() == expected.keys() == set(RES)
        for part in expected:
            torch.testing.assert_close(outputs[part], expected[part], atol=1e-4, rtol=1e-4)


def test_outputs_are_named_and_described():
    swin = Swin(embed_dim=12, depths=(1, 1, 1), num_heads=(1, 2, 4), out_indices=(0, 2), window_size=4)
    assert {name: (shape.channels, shape.stride) for name, shape in swin.output_shape().items()} == {
        "p0": (12, 4),
        "p2": (48, 16),
    }
    assert swin.size_divisibility == 16
    features = swin(torch.zeros(1, 3, 40, 33))
    assert {name: tuple(feature.shape) for name, feature in features.items()} == {
        "p0": (1, 12, 10, 9),
        "p2": (1, 48, 3, 3),
    }
    with pytest.raises(InputError, match="out_names must be a name for each"):
        Swin(out_names=("res2",))


def test_frozen_stages_are_not_trained():
    swin = Swin(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4, ape=True, frozen_stages=2)
    frozen = {name.split(".blocks")[0] for name, p in swin.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if name.startswith("layers")} >= {"layers.0"}
    assert not any(name.startswith(("layers.1", "layers.2", "norm")) for name in frozen)
    assert "absolute_pos_embed" in frozen and "patch_embed.proj.weight" in frozen


def test_recomputed_activations_give_the_same_gradients():
    arguments = dict(embed_dim=12, depths=(2, 2), num_heads=(1, 2), window_size=4, out_indices=(0, 1), drop_path_rate=0)
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        swin = Swin(**arguments, use_checkpoint=use_checkpoint).train()
        sum(feature.square().sum() for feature in swin(torch.ones(1, 3, 32, 48)).values()).backward()
        gradients.append([parameter.grad for parameter in swin.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_stochastic_depth_and_dropout_run_in_training_only():
    torch.manual_seed(0)
    swin = Swin(
        embed_dim=12,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
        out_indices=(0, 1),
        drop_rate=0.3,
        attn_drop_rate=0.3,
        drop_path_rate=0.5,
    )
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(swin.train()(image)["p1"], swin(image)["p1"])
        assert torch.equal(swin.eval()(image)["p1"], swin(image)["p1"])
