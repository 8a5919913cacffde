import copy

import pytest
import torch
import torch.nn.functional as F

import hourglass
from hourglass import AveragePooling, HourglassSwin, InputError, Plan, Reducer, Reduction, SkipBlocks, TokenClustering
from hourglass.compat import detectron2_encoder
from hourglass.encoders import Swin
from tests.golden_cases import load, names, under
from tests.models import embed_swin
from tests.small_swin import PLANS, TINY, image, run, tiny_swin


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


class KeepAll(Reducer):
    """A reduction to the map itself, by a plain copy."""

    def forward(self, tokens):
        return Reduction(tokens.clone(), positions=None, sizes=None, restore=lambda refined: refined)


@pytest.mark.parametrize("size", [(128, 192), (97, 131), (32, 32)])
def test_the_empty_plan_is_the_unmodified_model_bit_for_bit(size):
    swin = tiny_swin()
    assert_equal(run(hourglass.expedite(swin, Plan()), image(2, *size)), run(swin, image(2, *size)))


@pytest.mark.parametrize("size", [(128, 192), (97, 131), (32, 32)])
def test_keeping_every_token_is_the_unmodified_model_bit_for_bit(size):
    swin = tiny_swin(ape=True)
    expedited = hourglass.expedite(swin, Plan(KeepAll(), 1, 9, attention="plain"))
    assert_equal(run(expedited, image(2, *size)), run(swin, image(2, *size)))


@pytest.mark.parametrize("plan", [Plan(attention="fast"), Plan(KeepAll(), 1, 9)], ids=["empty", "keeping every token"])
@pytest.mark.parametrize("size", [(96, 128), (70, 101)])
def test_fast_attention_is_the_unmodified_model_to_rounding(plan, size):
    swin = tiny_swin()
    fast, unmodified = run(hourglass.expedite(swin, plan), image(2, *size)), run(swin, image(2, *size))
    for name in unmodified:
        torch.testing.assert_close(fast[name], unmodified[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_expediting_shares_every_parameter_and_leaves_the_model_as_it_was(plan):
    swin = tiny_swin()
    before, state = run(swin, image()), copy.deepcopy(swin.state_dict())
    expedited = hourglass.expedite(swin, plan)
    after = run(expedited, image())
    assert isinstance(expedited, HourglassSwin) and after.keys() == before.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    torch.testing.assert_close(after["p0"], before["p0"], atol=1e-5, rtol=1e-5)
    assert (after["p2"] - before["p2"]).abs().max() > 1e-2

    # The bias tables too: reading them for smaller windows changes nothing.
    assert_equal(run(swin, image()), before)
    assert_equal(expedited.state_dict(), state)
    for (name, parameter), (_, expected) in zip(expedited.named_parameters(), swin.named_parameters(), strict=True):
        assert parameter is expected, name
    assert expedited.output_shape() == swin.output_shape()
    assert expedited.size_divisibility == swin.size_divisibility == 32
    assert_equal(run(hourglass.expedite(expedited, Plan()), image()), before)


@pytest.mark.parametrize("name", names("expedit_swin_"))
def test_the_published_plan_equals_expedits_own_code(name):
    case, tensors = load(name)
    swin = published_swin(case)
    weights = under(tensors, "weights/")
    resized = case["state_dict_shape_differences_to_plain_swin"]
    weights |= {key: swin.state_dict()[key] for key in resized}
    swin.load_state_dict(weights)
    clustering, restoring = case["kwargs"]["token_clustering_cfg"], case["kwargs"]["token_reconstruction_cfg"]
    side = round(clustering["NUM_SPIXELS"] ** 0.5)
    reducer = TokenClustering.published(
        (side, side),
        clustering["N_ITERS"],
        clustering["WINDOW_SIZE"],
        clustering["TEMPERATURE"],
        restoring["TEMPERATURE"],
        restoring["K"],
    )
    start = case["kwargs"]["clustering_location"]
    plan = Plan(reducer, start, sum(case["kwargs"]["depths"][:3]), scope="window", published=True)
    expedited = hourglass.expedite(swin, plan).eval()
    blocks = {}
    for block in expedited.layers[2].blocks:
        block.register_forward_hook(lambda block, _, out: blocks.__setitem__(block, out))
    expected = under(tensors, "in0/")
    outputs = run(expedited, expected["image"])
    for level in ("res2", "res3", "res4", "res5"):
        torch.testing.assert_close(outputs[level], expected[level], atol=5e-4, rtol=0)
    for j in range(len(swin.layers[2].blocks)):
        expected_block = expected[f"stage_block{j}"]
        mine = blocks[expedited.layers[2].blocks[j]].flatten(1, 2)
        torch.testing.assert_close(mine, expected_block, atol=5e-4, rtol=0)


def published_swin(case: dict) -> Swin:
    reducer_arguments = ("token_clustering_cfg", "token_reconstruction_cfg", "clustering_location")
    arguments = {key: value for key, value in case["kwargs"].items() if key not in reducer_arguments}
    return Swin(**arguments, out_names=("res2", "res3", "res4", "res5"))


def slow_block(block, tokens, window, step, extent, sizes=None):
    """
    A shifted or plain block by one masked attention over all tokens of the padded map, in float64: a token meets those
    of its window, and of them only those that no roll has moved there from the opposite edge.
    """
    attn = block.attn
    batch, h, w, channels = tokens.shape
    padded = [-(-length // side) * side for length, side in zip((h, w), window)]
    x = F.pad(F.layer_norm(tokens, (channels,), block.norm1.weight, block.norm1.bias), (0, 0, 0, padded[1] - w))
    x = F.pad(x, (0, 0, 0, 0, 0, padded[0] - h)).flatten(1, 2)
    y, x_ = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in padded), indexing="ij"))
    together = torch.ones(len(y), len(y), dtype=torch.bool)
    for place, side, length in ((y, window[0], padded[0]), (x_, window[1], padded[1])):
        shift = side // 2 if block.shift_size else 0
        number = torch.div((place - shift) % length, side, rounding_mode="floor")
        wrapped = place < shift
        together &= (number[:, None] == number) & (wrapped[:, None] == wrapped)

    table = attn.relative_position_bias_table.T.reshape(attn.num_heads, 2 * extent - 1, 2 * extent - 1)
    # grid_sample reads bilinearly at (x, y) in [-1, 1] from the first to the last entry.
    places = torch.stack([(x_[:, None] - x_) * step[1], (y[:, None] - y) * step[0]], dim=-1) / max(extent - 1, 1)
    bias = F.grid_sample(table[None], places[None].to(table), padding_mode="border", align_corners=True)[0]

    q, k, v = attn.qkv(x).view(batch, len(y), 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * attn.scale + bias
    if sizes is not None:
        sizes = F.pad(sizes, (0, padded[1] - w, 0, padded[0] - h), value=step[0] * step[1])
        scores = scores + sizes.clamp(min=1e-6).log().flatten(1)[:, None, None]
    mixed = scores.masked_fill(~together, -torch.inf).softmax(-1) @ v
    mixed = attn.proj(mixed.transpose(1, 2).reshape(batch, *padded, channels)[:, :h, :w])
    tokens = tokens + mixed
    normed = F.layer_norm(tokens, (channels,), block.norm2.weight, block.norm2.bias)
    return tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))


@pytest.mark.parametrize("size", [(128, 192), (97, 131), (224, 304)])
@pytest.mark.parametrize("scope", ["window", "map"])
def test_a_reduced_stage_equals_a_slow_masked_reference(scope, size):
    """The third stage, with its windows cut by the edge at the second size."""
    swin = tiny_swin().double()
    reducer = TokenClustering((4, 4)) if scope == "window" else TokenClustering(2 / 3)
    expedited = hourglass.expedite(swin, Plan(reducer, 5, 8, scope=scope))
    with torch.no_grad():
        tokens = embed_swin(swin, image(2, *size).double())
        for stage in swin.layers[:2]:
            for block in stage.blocks:
                tokens = slow_block(block, tokens, (6, 6), (1, 1), 6)
            tokens = stage.downsample(tokens)
        blocks = swin.layers[2].blocks
        tokens = slow_block(blocks[0], tokens, (6, 6), (1, 1), 6)
        reduction = expedited.reducer(tokens)
        refined = reduction.tokens
        if scope == "window":
            window, step = (4, 4), (1.5, 1.5)
            # Every window on its own, those that the edge cuts without padding.
            height, width = tokens.shape[1:3]
            corner = tokens[:, height - (height % 6 or 6) :, width - (width % 6 or 6) :]
            alone = TokenClustering((4 / 6, 4 / 6))(corner).tokens
            torch.testing.assert_close(refined[:, -alone.shape[1] :, -alone.shape[2] :], alone)
        else:
            step = tuple(full / smaller for full, smaller in zip(tokens.shape[1:3], refined.shape[1:3]))
            window = tuple(round(6 / apart) for apart in step)
        for block in blocks[1:]:
            refined = slow_block(block, refined, window, step, 6, reduction.sizes)
        out = reduction.restore(refined)
        expected = F.layer_norm(out, out.shape[-1:], swin.norm2.weight, swin.norm2.bias).permute(0, 3, 1, 2)
        torch.testing.assert_close(expedited(image(2, *size).double())["p2"], expected, atol=1e-5, rtol=1e-5)


def test_frozen_stages_stay_in_evaluation_mode():
    for encoder in (swin := tiny_swin(frozen_stages=2)), hourglass.expedite(swin, PLANS["window"]):
        encoder.train()
        assert not encoder.patch_embed.training and not encoder.layers[0].blocks[0].training
        assert encoder.layers[1].training and encoder.norm2.training


def test_the_plan_is_followed_in_each_stage_that_it_reaches_into():
    """Blocks 3 to 6: the last of the second stage, the first three of the third."""
    swin = tiny_swin()
    expedited = hourglass.expedite(swin, Plan(TokenClustering(0.5), 3, 7))
    maps = []
    expedited.reducer.register_forward_hook(lambda _, inputs, out: maps.append((inputs[0].shape, out.tokens.shape)))
    run(expedited, image(1))
    assert maps == [((1, 16, 24, 24), (1, 8, 12, 24)), ((1, 8, 12, 48), (1, 4, 6, 48))]


def test_the_control_leaves_the_plans_blocks_out():
    swin = tiny_swin()
    control = hourglass.expedite(swin, Plan(TokenClustering(0.5), 4, 8, attention="plain").control())
    shorter = tiny_swin()
    shorter.load_state_dict(swin.state_dict())
    shorter.layers[2].blocks = shorter.layers[2].blocks[:0]
    assert_equal(run(control, image()), run(shorter, image()))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("size", [(97, 131), (33, 640), (4, 4)])
def test_any_size_in_float32_and_bfloat16(plan, size):
    swin = tiny_swin()
    expedited = hourglass.expedite(swin, plan)
    x = image(2, *size)
    exact = run(expedited, x)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(expedited, x)
    for name, feature in run(swin, x).items():
        assert exact[name].shape == feature.shape and exact[name].isfinite().all()
        assert F.cosine_similarity(half[name].float().flatten(1), exact[name].flatten(1)).min() > 0.98
        # Images of a batch do not see each other. (Centres of padding alone tie, and rounding chooses among them.)
        if not plan.published:
            torch.testing.assert_close(exact[name][:1], run(expedited, x[:1])[name], atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter():
    swin = tiny_swin().train()
    expedited = hourglass.expedite(swin, PLANS["window"]).train()
    sum(feature.square().sum() for feature in expedited(image(1)).values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in swin.parameters())


@pytest.mark.parametrize(
    "plan, message",
    [
        (lambda: Plan(TokenClustering((4, 4)), 4, 11), "0 <= start < stop <= 10"),
        (lambda: Plan(TokenClustering((7, 7)), 4, 8, scope="window"), "larger than the token map"),
        (lambda: Plan(SkipBlocks(), 4, 8, scope="window"), "SkipBlocks"),
        (lambda: Plan(AveragePooling((4, 4)), 4, 8, published=True), "published form"),
        (lambda: Plan(TokenClustering((4, 4)), 4, 8, published=True), "scope \"window\" in Swin, got 'map'"),
        (lambda: Plan(TokenClustering((3, 3)), 4, 8, scope="window", published=True), "3 x 3"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(plan, message):
    with pytest.raises(InputError, match=message):
        hourglass.expedite(tiny_swin(), plan())


@pytest.mark.skipif(detectron2_encoder("SwinTransformer") is None, reason="this Detectron2 has no Swin of its own")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_detectron2s_own_swin_is_expedited_too(plan):
    swin = tiny_swin()
    official = detectron2_encoder("SwinTransformer")(**TINY).eval()
    official.load_state_dict(swin.state_dict())
    assert_equal(run(hourglass.expedite(official, Plan()), image()), run(official, image()))
    expected = run(hourglass.expedite(swin, plan), image())
    for name, feature in run(hourglass.expedite(official, plan), image()).items():
        torch.testing.assert_close(feature, expected[name], atol=1e-4, rtol=1e-4)
