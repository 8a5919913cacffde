"""Blocks of encoders that are not installed here: parameters in bare modules, run as placed blocks alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass import BipartiteMatching, DensityPeaks, TokenClustering
from hourglass.encoders.registry import family_of
from hourglass.reduction.reducer import Place
from hourglass.reduction.scope import in_scope
from tests.golden_cases import load, under


class SwiGLU(nn.Module):
    """EVA-02's MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class MLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.children()
        return second(F.gelu(first(x)))


def bare(weights: dict[str, Tensor], eps: float, kind: type = nn.Module) -> nn.Module:
    """Modules without a forward pass of their own that hold these parameters, layers those of torch."""
    if set(weights) <= {"weight", "bias"}:
        weight = weights["weight"]
        if weight.dim() == 1:
            module = nn.LayerNorm(len(weight), eps=eps)
        else:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in weights)
        module.load_state_dict(weights)
        return module
    module = kind()
    for name in dict.fromkeys(name.split(".")[0] for name in weights):
        if name in weights:
            setattr(module, name, nn.Parameter(weights[name]))
        else:
            mlp = SwiGLU if "mlp.w1.weight" in weights else MLP
            setattr(module, name, bare(under(weights, f"{name}."), eps, mlp if name == "mlp" else nn.Module))
    return module


def golden(name: str, part: str):
    case, tensors = load(name)
    options = case["kwargs"]
    block = bare(under(tensors, f"{part}/weights/"), options["norm_eps"])
    block.window_size = 4 if part == "window" else 0
    block.beit_like_gamma = options.get("beit_like_gamma", False)
    if name == "eva01_blocks":
        block.attn.beit_like_qkv_bias = options["beit_like_qkv_bias"]
    block.attn.num_heads, block.attn.use_rel_pos = options["num_heads"], options.get("use_rel_pos", False)
    if name != "eva01_blocks":
        del block.beit_like_gamma
    encoder = nn.Module()
    encoder.blocks = nn.ModuleList([block])
    return family_of(encoder), encoder, tensors[f"{part}/in"], tensors[f"{part}/out"]


@pytest.mark.parametrize("name", ["eva01_blocks", "eva02_blocks", "sam_blocks"])
@pytest.mark.parametrize("part", ["window", "global"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_placed_block_on_the_full_map_is_the_official_one(name, part, fast):
    family, encoder, tokens, expected = golden(name, part)
    assert family.name == {"eva01_blocks": "EVA-01 ViT", "eva02_blocks": "EVA-02 ViT", "sam_blocks": "ViT"}[name]
    with torch.no_grad():
        out = family.placed(encoder.blocks[0], fast)(tokens, Place(tokens.shape[1:3]))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["eva01_blocks", "eva02_blocks", "sam_blocks"])
@pytest.mark.parametrize("fast", [True, False])
def test_tokens_in_another_order_and_where_they_lie_give_the_same(name, fast):
    """A global block on permuted tokens with their positions, tables and rotations read there."""
    family, encoder, tokens, expected = golden(name, "global")
    size = tokens.shape[1:3]
    order = torch.randperm(size[0] * size[1], generator=torch.Generator().manual_seed(0))
    places = torch.stack([order // size[1], order % size[1]], dim=-1).float().view(1, 1, -1, 2)
    permuted = tokens.flatten(1, 2)[:, order][:, None]
    place = Place(size, positions=places.expand(len(tokens), -1, -1, -1))
    with torch.no_grad():
        out = family.placed(encoder.blocks[0], fast)(permuted, place)
    torch.testing.assert_close(out[:, 0, order.argsort()], expected.flatten(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["eva01_blocks", "eva02_blocks", "sam_blocks"])
@pytest.mark.parametrize("reducer", [TokenClustering((4, 3)), DensityPeaks((4, 3))], ids=["clustering", "peaks"])
def test_fast_and_plain_agree_on_fewer_tokens(name, reducer):
    family, encoder, tokens, _ = golden(name, "global")
    with torch.no_grad():
        fast, plain = (reducer.run(tokens, [family.placed(encoder.blocks[0], mode)], True) for mode in (True, False))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    assert fast.shape == tokens.shape and not torch.equal(fast, tokens)


@pytest.mark.parametrize("name", ["eva01_blocks", "eva02_blocks", "sam_blocks"])
@pytest.mark.parametrize("part", ["window", "global"])
@pytest.mark.parametrize("fast", [True, False])
def test_lists_of_tokens_run_under_autocast(name, part, fast):
    family, encoder, tokens, _ = golden(name, part)
    reducer = in_scope(BipartiteMatching(0.2), 4 if part == "window" else None)
    view = family.placed(encoder.blocks[0], fast)
    with torch.no_grad():
        exact = reducer.run(tokens, [view], True)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = reducer.run(tokens, [view], True)
    assert exact.isfinite().all() and rounded.isfinite().all()
    # Rounding may change a pair that merges, and so a few tokens.
    assert (rounded.float() - exact).abs().median() < 0.02 * exact.abs().max()


def test_rotations_between_tokens_follow_from_the_tables():
    """Half a token turns by half the angle, in windows of 4 too, where one token turns by more than half a circle."""
    family, encoder, *_ = golden("eva02_blocks", "window")
    frequencies = family.placed(encoder.blocks[0]).attn.frequencies()
    expected = 16 / 4 * 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(frequencies, expected.expand(2, -1), atol=1e-4, rtol=1e-4)
