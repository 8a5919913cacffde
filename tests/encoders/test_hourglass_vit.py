import copy

import pytest
import torch

import hourglass
from hourglass import AveragePooling, HourglassViT, InputError, Plan, SkipBlocks, TokenClustering
from hourglass.compat import detectron2_encoder
from hourglass.encoders import SimpleFeaturePyramid, ViT, find_encoder
from hourglass.reduction.reducer import Place
from tests.models import embed_vit, placed
from tests.small_vit import PLANS, TINY, KeepAll, Shuffle, image, last, tiny_vit


def test_the_empty_plan_is_the_unmodified_model_bit_for_bit():
    vit = tiny_vit()
    for x in (image(), image(1, 56, 104)):
        assert torch.equal(last(hourglass.expedite(vit, Plan()), x), last(vit, x))


@pytest.mark.parametrize("size", [(64, 64), (56, 104), (8, 8)])
def test_keeping_every_token_is_the_unmodified_model_bit_for_bit(size):
    vit = tiny_vit()
    expedited = hourglass.expedite(vit, Plan(KeepAll(), 1, 4, attention="plain"))
    assert torch.equal(last(expedited, image(2, *size)), last(vit, image(2, *size)))


@pytest.mark.parametrize("plan", [Plan(attention="fast"), Plan(KeepAll(), 1, 4)], ids=["empty", "keeping every token"])
@pytest.mark.parametrize("size", [(64, 64), (56, 104), (8, 8)])
@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_fast_attention_is_the_unmodified_model_to_rounding(plan, size, use_rel_pos):
    vit = tiny_vit(use_rel_pos=use_rel_pos)
    expedited = hourglass.expedite(vit, plan)
    torch.testing.assert_close(last(expedited, image(2, *size)), last(vit, image(2, *size)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["plain", "fast"])
@pytest.mark.parametrize("size", [(64, 64), (56, 104)])
def test_global_blocks_take_tokens_anywhere(size, attention):
    """In another order they give the unmodified output."""
    vit = tiny_vit(window_block_indexes=(0, 3))
    expedited = hourglass.expedite(vit, Plan(Shuffle(), 1, 3, attention=attention))
    torch.testing.assert_close(last(expedited, image(2, *size)), last(vit, image(2, *size)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_expediting_shares_every_parameter_and_leaves_the_model_as_it_was(plan):
    vit = tiny_vit()
    before, forward, state = last(vit, image()), vit.forward, copy.deepcopy(vit.state_dict())
    expedited = hourglass.expedite(vit, plan)
    assert not torch.equal(last(expedited, image()), before)

    assert torch.equal(last(vit, image()), before)
    assert vit.forward == forward and type(vit) is ViT
    assert list(expedited.state_dict()) == list(state)
    for (name, parameter), (_, expected) in zip(expedited.named_parameters(), vit.named_parameters(), strict=True):
        assert parameter is expected and parameter.data_ptr() == expected.data_ptr(), name
    expedited.train()
    assert not vit.training and not vit.blocks[0].training


def test_a_checkpoint_of_the_encoder_loads_into_the_hourglass():
    source, target = tiny_vit(), tiny_vit(rel_pos_zero_init=False)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    expedited = hourglass.expedite(target, PLANS["clustering"])
    expedited.load_state_dict(source.state_dict())
    assert torch.equal(last(expedited, image()), last(hourglass.expedite(source, PLANS["clustering"]), image()))
    assert torch.equal(last(target, image()), last(source, image()))


def test_the_encoder_inside_a_model_is_found_and_replaced():
    pyramid = SimpleFeaturePyramid(tiny_vit(), "last_feat", 8, (2.0, 1.0, 0.5), square_pad=64).eval()
    expedited = hourglass.expedite(pyramid, PLANS["clustering"])
    assert find_encoder(expedited)[0] == "net" and isinstance(expedited.net, HourglassViT)
    assert type(pyramid.net) is ViT
    assert list(expedited.state_dict()) == list(pyramid.state_dict())
    assert expedited.size_divisibility == 64 and expedited.output_shape() == pyramid.output_shape()
    # Another plan replaces the first, it is not put on top.
    again = hourglass.expedite(expedited, Plan())
    with torch.no_grad():
        for name, level in pyramid(image()).items():
            assert torch.equal(again(image())[name], level)


def test_published_is_the_reducers_published_form_without_proportional_attention():
    vit = tiny_vit()
    published = Plan(TokenClustering((3, 3), temperature=0.2), 1, 4, scope="window", published=True)
    reducer = TokenClustering.published((3, 3), temperature=0.2)
    plan = Plan(reducer, 1, 4, scope="window", proportional=False, attention="plain")
    expected = last(hourglass.expedite(vit, plan), image(2, 56, 104))
    assert torch.equal(last(hourglass.expedite(vit, published), image(2, 56, 104)), expected)


def test_the_control_leaves_the_plans_blocks_out():
    vit = tiny_vit()
    with torch.no_grad():
        tokens = embed_vit(vit, image())
        for i in (0, 4):
            tokens = vit.blocks[i](tokens)
    control = Plan(TokenClustering((5, 5)), 1, 4, attention="plain").control()
    assert torch.equal(last(hourglass.expedite(vit, control), image()), tokens.permute(0, 3, 1, 2))


@pytest.mark.parametrize("plan", [PLANS[name] for name in ("share", "window", "pooled windows", "control")])
@pytest.mark.parametrize("size", [(8, 8), (8, 40), (72, 56), (104, 64), (40, 32)])
def test_maps_of_any_size(plan, size):
    vit = tiny_vit()
    out = last(hourglass.expedite(vit, plan), image(2, *size))
    assert out.shape == last(vit, image(2, *size)).shape
    assert out.isfinite().all()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_images_of_a_batch_do_not_meet(plan):
    expedited = hourglass.expedite(tiny_vit(), plan)
    x = image(3, 72, 56)
    together = last(expedited, x)
    for i in range(3):
        torch.testing.assert_close(last(expedited, x[i : i + 1])[0], together[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_bfloat16(plan):
    vit = tiny_vit()
    reference = last(hourglass.expedite(vit, plan), image())
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = last(hourglass.expedite(vit, plan), image())
    features = last(hourglass.expedite(vit.bfloat16(), plan), image().bfloat16())
    assert features.dtype == torch.bfloat16
    for out in (by_autocast, features):
        assert (out.float() - reference).abs().mean() < 0.05 * reference.abs().mean()


def test_gradients_reach_every_parameter_under_a_plan():
    for plan in (PLANS["clustering"], PLANS["window"]):
        vit = tiny_vit(use_act_checkpoint=True).train()
        hourglass.expedite(vit, plan)(image())["last_feat"].square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())


def test_a_smaller_map_needs_fewer_windows():
    """64 tokens a side in windows of 14 become 46 in windows of 10, both five a side."""
    vit = tiny_vit(img_size=512, window_size=14, window_block_indexes=(0, 1, 2, 3, 4), depth=2)
    expedited = hourglass.expedite(vit, Plan(TokenClustering((46, 46)), 1, attention="plain"))
    shapes = []
    expedited.blocks[1].attn.qkv.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    last(expedited, image(1, 512, 512))
    assert shapes == [(25, 10, 10, 16)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Plan(TokenClustering((5, 5)), 3, 3), "stop must be a whole number over start"),
        (lambda: Plan(TokenClustering((5, 5)), -1), "start must be a whole number of at least 0, got -1"),
        (lambda: Plan(TokenClustering((5, 5)), scope="global"), "scope must be 'map' or 'window', got 'global'"),
        (lambda: Plan("clustering"), "reducer must be a hourglass.Reducer or None, got 'clustering'"),
        (lambda: Plan(proportional=1), "proportional must be True or False, got 1"),
        (lambda: hourglass.expedite(tiny_vit(), Plan(SkipBlocks(), 2, 6)), "stop <= 5"),
        (lambda: hourglass.expedite(tiny_vit(), Plan(SkipBlocks(), 5)), "start < stop <= 5"),
        (lambda: hourglass.expedite(tiny_vit(), Plan(TokenClustering((5, 5)), 1, scope="window")), "larger than"),
        (
            lambda: hourglass.expedite(tiny_vit(), Plan(TokenClustering((3, 3)), 4, scope="window")),
            "needs blocks with windows of one size among those of the plan, got none",
        ),
        (
            lambda: last(hourglass.expedite(tiny_vit(), Plan(TokenClustering((9, 4)), 1)), image()),
            r"grid \(9, 4\) is larger than the token map, which has 8 x 8 tokens",
        ),
        (
            lambda: hourglass.expedite(tiny_vit(), Plan(Shuffle(), 1, 4)),
            "Shuffle must set on_grid = False",
        ),
        (lambda: hourglass.expedite(torch.nn.Linear(2, 2), Plan()), "got Linear, which has none"),
        (lambda: hourglass.expedite(tiny_vit(), None), "plan must be a hourglass.Plan, got None"),
        (
            lambda: hourglass.expedite(torch.nn.ModuleList([tiny_vit(), tiny_vit()]), Plan()),
            r"with 0 \(ViT\), 1 \(ViT\)",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_keys_of_no_size_do_not_break_attention():
    """A window of one reduced token that stands for nothing."""
    vit = tiny_vit()
    with torch.no_grad():
        out = placed(vit, vit.blocks[0])(torch.randn(2, 2, 2, 16), Place((8, 8), sizes=torch.zeros(2, 2, 2)))
    assert out.isfinite().all()


def test_under_scope_window_blocks_attend_in_the_reducers_windows():
    """15 tokens in windows of 14 are a whole window and a cut one; so they stay, as 4 tokens and 1."""
    vit = tiny_vit(img_size=120, window_size=14, window_block_indexes=(0, 1), depth=2)
    expedited = hourglass.expedite(vit, Plan(AveragePooling((4, 4)), 1, scope="window", attention="plain"))
    shapes = []
    expedited.blocks[1].attn.qkv.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    last(expedited, image(1, 120, 120))
    assert shapes == [(4, 4, 4, 16)]


@pytest.mark.skipif(detectron2_encoder("ViT") is None, reason="this Detectron2 has no ViT of its own")
@pytest.mark.parametrize("plan", [Plan(), *PLANS.values()], ids=["empty", *PLANS])
def test_detectron2s_own_vit(plan):
    pytest.importorskip("timm")
    from detectron2.modeling import ViT as TheirViT

    vit = tiny_vit()
    official = TheirViT(**TINY).eval()
    official.load_state_dict(vit.state_dict())
    before = last(official, image(2, 56, 72))
    out = last(hourglass.expedite(official, plan), image(2, 56, 72))
    torch.testing.assert_close(out, last(hourglass.expedite(vit, plan), image(2, 56, 72)), atol=1e-4, rtol=1e-4)
    assert torch.equal(last(official, image(2, 56, 72)), before)
    if plan.reducer is None:
        assert torch.equal(out, before)
