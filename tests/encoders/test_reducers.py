"""Encoders under reducers that put tokens off the grid, merge them block by block, or select them."""

import copy

import pytest
import torch

import hourglass
from hourglass import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    GridMerging,
    InputError,
    Plan,
    SkipBlocks,
    TokenSelection,
)
from hourglass.compat import detectron2_encoder
from hourglass.encoders import find_encoder
from hourglass.reduction import collect_losses
from hourglass.reduction.windows import grid_positions
from tests import small_swin as of_swin
from tests.models import embed_vit
from tests.reduction import references
from tests.small_plans import FEWER, selection
from tests.small_vit import TINY, image, last, tiny_vit

SIZES = pytest.mark.parametrize("size", [(64, 64), (56, 104), (8, 8)], ids=str)
ATTENTION = pytest.mark.parametrize("attention", ["fast", "plain"])


def global_vit(**kwargs):
    """Attention is global, its tables are for 5 x 5 tokens: 40 pixels."""
    return tiny_vit(**{"img_size": 40, "window_block_indexes": (), **kwargs}).double()


# Plans that keep every token of blocks 1 to 3, of which 1 and 3 have windows of 4.
KEEPING_ALL = {
    "peaks": lambda attention: Plan(DensityPeaks(1.0), 1, 4, scope="window", attention=attention),
    "merged grid": lambda attention: Plan(GridMerging(1.0), 1, 4, scope="window", attention=attention),
    "matching": lambda attention: Plan(BipartiteMatching(0), 1, 4, scope="window", attention=attention),
    "selection": lambda attention: Plan(selection(bias=1e4), 1, 4, attention=attention),
}


@ATTENTION
@SIZES
@pytest.mark.parametrize("plan", KEEPING_ALL.values(), ids=KEEPING_ALL)
def test_all_tokens_are_the_unmodified_vit(plan, size, attention):
    vit, x = tiny_vit().double(), image(2, *size).double()
    out = last(hourglass.expedite(vit, plan(attention)), x)
    torch.testing.assert_close(out, last(vit, x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "plan", [Plan(DensityPeaks(1.0), 1, 3), Plan(BipartiteMatching(0), 1, 3)], ids=["peaks", "tome"]
)
def test_plain_vits_take_the_whole_map(plan):
    vit, x = global_vit(), image(2, 56, 72).double()
    torch.testing.assert_close(last(hourglass.expedite(vit, plan), x), last(vit, x), atol=1e-6, rtol=1e-6)


@ATTENTION
@pytest.mark.parametrize("size", [(96, 96), (72, 136)], ids=str)
@pytest.mark.parametrize("name", ["peaks", "selection"])
def test_all_tokens_are_the_unmodified_swin(name, size, attention):
    swin = of_swin.tiny_swin().double().eval()
    blocks = sum(len(stage.blocks) for stage in swin.layers)
    plan = Plan(DensityPeaks(1.0), 1, blocks, scope="window", attention=attention)
    if name == "selection":
        reducer = TokenSelection("random")
        reducer.bind([block.norm1.weight.numel() for stage in swin.layers for block in stage.blocks][1:])
        for selector in reducer.blocks:
            torch.nn.init.constant_(selector[3].bias[0], 1e4)
        plan = Plan(reducer, 1, blocks, attention=attention)
    x = torch.randn(2, 3, *size, dtype=torch.double)
    with torch.no_grad():
        expected, out = swin(x), hourglass.expedite(swin, plan)(x)
    for level in expected:
        torch.testing.assert_close(out[level], expected[level], atol=1e-6, rtol=1e-6)


class Placed(AveragePooling):
    """Average pooling that says where its tokens lie: on the grid."""

    on_grid = False

    def forward(self, tokens):
        reduction = super().forward(tokens)
        (height, width), (h, w) = tokens.shape[1:3], reduction.tokens.shape[1:3]
        step = torch.tensor([height / h, width / w])
        positions = (grid_positions((h, w), tokens.device) + 0.5) * step - 0.5
        return reduction._replace(positions=positions.expand(len(tokens), -1, -1, -1))


@ATTENTION
@pytest.mark.parametrize("grid", [(3, 2), (4, 4), (1, 3)], ids=str)
def test_positions_on_the_grid_are_the_grid(grid, attention):
    """In windows and global blocks of a ViT, in shifted windows of a Swin."""
    vit, x = tiny_vit().double(), image(2, 64, 96).double()
    placed, pooled = (
        hourglass.expedite(vit, Plan(reducer(grid), 1, 4, scope="window", attention=attention))
        for reducer in (Placed, AveragePooling)
    )
    torch.testing.assert_close(last(placed, x), last(pooled, x), atol=1e-6, rtol=1e-6)
    swin = of_swin.tiny_swin().double().eval()
    window = swin.layers[0].blocks[0].attn.window_size[0]
    x = torch.randn(2, 3, 4 * 4 * window, 4 * 8 * window, dtype=torch.double)  # whole windows in the first stages
    with torch.no_grad():
        placed, pooled = (
            hourglass.expedite(swin, Plan(reducer(grid), 0, 4, scope="window", attention=attention))(x)
            for reducer in (Placed, AveragePooling)
        )
    for level in pooled:
        torch.testing.assert_close(placed[level], pooled[level], atol=1e-6, rtol=1e-6)


def test_peaks_in_global_blocks_equal_the_reference():
    vit, x = global_vit(), image(1, 40, 40).double()
    out = last(hourglass.expedite(vit, Plan(DensityPeaks((3, 2)), 1, 2)), x)
    with torch.no_grad():
        tokens = vit.blocks[0](embed_vit(vit, x))
        reduction = DensityPeaks((3, 2))(tokens)
        refined = _reference_block(vit.blocks[1], *(part.flatten(0, 2) for part in reduction[:3]), (5, 5))[0]
        tokens = reduction.restore(refined.view_as(reduction.tokens))
        for block in vit.blocks[2:]:
            tokens = block(tokens)
    torch.testing.assert_close(out, tokens.permute(0, 3, 1, 2), atol=1e-6, rtol=1e-6)


def _reference_block(block, tokens, positions, sizes, extent):
    """A block on tokens (L, C) by loops, and its keys; ``tokens`` after attention are kept for merging."""
    attended, keys = references.attention(block.attn, block.norm1(tokens), positions, sizes, extent)
    tokens = tokens + attended
    return tokens + block.mlp(block.norm2(tokens)), keys, tokens


@pytest.mark.parametrize("restore_mode", ["update", "features"])
def test_matching_equals_the_reference(restore_mode):
    """25 tokens, of which two blocks merge 6 each."""
    vit, x = global_vit(), image(1, 40, 40).double()
    out = last(hourglass.expedite(vit, Plan(BipartiteMatching(6, restore_mode), 1, 3)), x)
    with torch.no_grad():
        tokens = vit.blocks[0](embed_vit(vit, x)).flatten(0, 2)
        positions = grid_positions((5, 5), tokens.device).flatten(0, 1).double()
        sizes = torch.ones(25).double()
        undo = []
        for block, remaining in zip(vit.blocks[1:3], (19, 13)):
            _, keys, tokens = _reference_block(block, tokens, positions, sizes, (5, 5))
            labels = references.bipartite_matching(keys, 6)
            weights = sizes.tolist()
            merged, positions = (
                torch.tensor(references.merged(of, labels, weights)).double() for of in (tokens, positions)
            )
            sizes = torch.stack([sizes[[value == label for value in labels]].sum() for label in range(remaining)])
            undo.append((tokens, merged, labels))
            tokens = merged + block.mlp(block.norm2(merged))
        for before, merged, labels in reversed(undo):
            tokens = before + (tokens - merged)[labels] if restore_mode == "update" else tokens[labels]
        tokens = tokens.view(1, 5, 5, -1)
        for block in vit.blocks[3:]:
            tokens = block(tokens)
    torch.testing.assert_close(out, tokens.permute(0, 3, 1, 2), atol=1e-6, rtol=1e-6)


def test_selection_equals_the_reference():
    """Block 1 has windows: all attend, the selected go through the MLP. Block 2 is global: only they run."""
    vit, x, reducer = global_vit(window_block_indexes=(0, 1)), image(1, 40, 40).double(), selection()
    out = last(hourglass.expedite(vit, Plan(reducer, 1, 4)), x)
    with torch.no_grad():
        tokens = vit.blocks[0](embed_vit(vit, x))
        block = vit.blocks[1]
        # Without its MLP the block is attention alone.
        alone = copy.deepcopy(block)
        alone.mlp = torch.nn.Conv2d(16, 16, 1)
        alone.mlp.forward = torch.zeros_like
        attended = alone(tokens).flatten(0, 2)
        kept = _kept(reducer.blocks[0], attended)
        tokens = torch.stack([t + block.mlp(block.norm2(t)) if i in kept else t for i, t in enumerate(attended)])
        positions = grid_positions((5, 5), tokens.device).flatten(0, 1).double()
        for block, selector in zip(vit.blocks[2:4], reducer.blocks[1:]):
            kept = _kept(selector, tokens)
            refined = _reference_block(block, tokens[kept], positions[kept], torch.ones(len(kept)).double(), (5, 5))[0]
            tokens = tokens.clone()
            tokens[kept] = refined
        tokens = vit.blocks[4](tokens.view(1, 5, 5, -1))
    torch.testing.assert_close(out, tokens.permute(0, 3, 1, 2), atol=1e-6, rtol=1e-6)


def _kept(selector, tokens):
    scores = selector(tokens)
    kept = [i for i in range(len(tokens)) if scores[i, 0] >= scores[i, 1]]
    assert 0 < len(kept) < len(tokens)
    return kept


@pytest.mark.parametrize("windows", [(), (0, 1, 3)], ids=["global", "windows"])
def test_training_masks_what_inference_leaves_out(windows):
    """With selectors that are sure, drawing changes nothing: both passes give the same."""
    vit, x, reducer = tiny_vit(window_block_indexes=windows).double(), image(2, 40, 32).double(), selection()
    with torch.no_grad():
        for selector in reducer.blocks:
            selector[3].weight.mul_(1e5)
    expedited = hourglass.expedite(vit, Plan(reducer, 1, 4))
    selected = last(expedited, x)
    masked = last(expedited.train(), x)
    torch.testing.assert_close(masked, selected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_reaches_the_selectors_and_the_model(recompute):
    vit = tiny_vit(use_act_checkpoint=recompute).train()
    reducer = selection(target=0.3).float()
    expedited = hourglass.expedite(vit, Plan(reducer, 1, 4)).train()
    with collect_losses() as collected:
        loss = expedited(image())["last_feat"].square().mean()
    (loss + sum(collected.losses.values())).backward()
    for parameter in [*vit.parameters(), *reducer.parameters()]:
        assert parameter.grad.isfinite().all() and parameter.grad.ne(0).any()
    assert set(collected.figures) == {"kept/0", "kept/1", "kept/2"}


@pytest.mark.parametrize("plan", FEWER.values(), ids=FEWER)
def test_images_of_a_batch_do_not_meet(plan):
    expedited = hourglass.expedite(tiny_vit().double(), plan())
    x = image(3, 72, 56).double()
    together = last(expedited, x)
    for i in range(3):
        torch.testing.assert_close(last(expedited, x[i : i + 1])[0], together[i], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("plan", FEWER.values(), ids=FEWER)
@pytest.mark.parametrize("size", [(8, 8), (8, 40), (72, 56), (104, 64)], ids=str)
def test_maps_of_any_size_and_the_same_twice(plan, size):
    vit, plan = tiny_vit().double(), plan()
    out = last(hourglass.expedite(vit, plan), image(2, *size).double())
    assert out.shape == last(vit, image(2, *size).double()).shape and out.isfinite().all()
    assert torch.equal(last(hourglass.expedite(vit, plan), image(2, *size).double()), out)


@pytest.mark.parametrize("plan", FEWER.values(), ids=FEWER)
def test_bfloat16(plan):
    """Near the float32 output: nearer than the control is."""
    vit, plan = tiny_vit(), plan()
    if isinstance(plan.reducer, TokenSelection):
        plan.reducer.float()
    reference = last(hourglass.expedite(vit, plan), image())
    control = last(hourglass.expedite(vit, Plan(SkipBlocks(), 1, 4)), image())
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = last(hourglass.expedite(vit, plan), image())
    features = last(hourglass.expedite(vit.bfloat16(), plan), image().bfloat16())
    assert features.dtype == torch.bfloat16
    for out in (by_autocast, features):
        assert (out.float() - reference).abs().mean() < 0.5 * (control - reference).abs().mean()


@pytest.mark.parametrize("name", ["peaks", "matching"])
def test_gradients_reach_every_parameter(name):
    vit = tiny_vit(use_act_checkpoint=True).train()
    hourglass.expedite(vit, FEWER[name]())(image())["last_feat"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())


def test_proportional_attention_is_the_plans_choice():
    vit, x = tiny_vit(), image()
    outs = [
        last(hourglass.expedite(vit, Plan(BipartiteMatching(0.2), 1, 4, scope="window", proportional=choice)), x)
        for choice in (True, False)
    ]
    assert not torch.allclose(*outs, atol=1e-4)


def test_an_expedited_model_holds_its_selectors_and_shares_them():
    vit, reducer = tiny_vit(), selection().float()
    expedited = hourglass.expedite(vit, Plan(reducer, 1, 4))
    extra = set(expedited.state_dict()) - set(vit.state_dict())
    assert extra == {f"reducer.{name}" for name in reducer.state_dict()}
    assert find_encoder(expedited)[1].reducer is reducer


@pytest.mark.skipif(detectron2_encoder("ViT") is None, reason="this Detectron2 has no ViT of its own")
@pytest.mark.parametrize("plan", FEWER.values(), ids=FEWER)
def test_detectron2s_own_vit(plan):
    pytest.importorskip("timm")
    from detectron2.modeling import ViT as TheirViT

    vit = tiny_vit().double()
    official = TheirViT(**TINY).double().eval()
    official.load_state_dict(vit.state_dict())
    x = image(2, 56, 72).double()
    expected = last(hourglass.expedite(vit, plan()), x)
    torch.testing.assert_close(last(hourglass.expedite(official, plan()), x), expected, atol=1e-6, rtol=1e-6)


def swin(reducer, scope):
    return hourglass.expedite(of_swin.tiny_swin(), Plan(reducer, 1, 4, scope=scope))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Plan(DensityPeaks((5, 5)), 1, 4, scope="window"), r"grid \(5, 5\) is larger than the token map"),
        (
            lambda: Plan(BipartiteMatching(9), 1, 4, scope="window"),
            "r must be at most half of the 16 tokens of a window",
        ),
        (lambda: Plan(DensityPeaks(0.5), 1, 4), 'DensityPeaks needs scope "window" where blocks have windows'),
        (
            lambda: Plan(BipartiteMatching(0.2), 1, 4),
            'BipartiteMatching needs scope "window" where blocks have windows',
        ),
        (lambda: Plan(selection(), 1, 4, scope="window"), 'TokenSelection acts on whole blocks: scope must be "map"'),
        (lambda: Plan(selection(), 1, 3), "are for 3 blocks of 16 channels, the plan has 2 of 16"),
        (lambda: Plan(BipartiteMatching(2), 1, published=True), "published=True needs a reducer with a published form"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message) as refusal:
        hourglass.expedite(tiny_vit(), make())
    assert "\n" not in str(refusal.value)


def test_refusals_of_a_swin_and_of_convolutions():
    for make, message in (
        (
            lambda: swin(BipartiteMatching(2), "window"),
            "BipartiteMatching needs an encoder whose windows do not shift, got a Swin",
        ),
        (lambda: swin(DensityPeaks(0.5), "map"), 'DensityPeaks needs scope "window" where blocks have windows'),
        (
            lambda: hourglass.expedite(
                tiny_vit(window_block_indexes=(), residual_block_indexes=(2,)), Plan(DensityPeaks(0.5), 1, 4)
            ),
            "DensityPeaks needs blocks without convolutions, got blocks with them in blocks 1 to 3",
        ),
    ):
        with pytest.raises(InputError, match=message):
            make()
