"""Encoders and blocks are called, shared and recognised as the contract says, whoever wrote them."""

import copy
import functools
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hourglass
from hourglass import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    GridMerging,
    InputError,
    Plan,
    Reducer,
    Reduction,
    SkipBlocks,
    TokenClustering,
    TokenSelection,
)
from hourglass.encoders import Swin, ViT, find_encoder
from hourglass.encoders.swin.model import Block as SwinBlock
from hourglass.encoders.vit.model import Attention, Block
from tests.small_swin import TINY as TINY_SWIN
from tests.small_swin import tiny_swin
from tests.small_vit import TINY, Shuffle, tiny_vit

VIT_PLANS = {
    "empty": lambda: Plan(),
    "fast": lambda: Plan(attention="fast"),
    "clustering": lambda: Plan(TokenClustering(0.6), 1, 4),
    "clustering, plain": lambda: Plan(TokenClustering(0.6), 1, 4, attention="plain"),
    "windows": lambda: Plan(TokenClustering((3, 3)), 1, 4, scope="window"),
    "pooling": lambda: Plan(AveragePooling(0.5), 1, 4),
    "peaks": lambda: Plan(DensityPeaks((3, 3)), 1, 4, scope="window"),
    "matching": lambda: Plan(BipartiteMatching(0.2), 1, 4, scope="window"),
    "selection": lambda: Plan(TokenSelection("random"), 1, 4),
}
SWIN_PLANS = {
    "empty": lambda: Plan(),
    "fast": lambda: Plan(attention="fast"),
    "clustering": lambda: Plan(TokenClustering(0.6), 3, 7),
    "windows": lambda: Plan(TokenClustering((4, 4)), 4, 8, scope="window"),
    "published": lambda: Plan(TokenClustering((4, 4)), 4, 8, scope="window", published=True),
    "peaks": lambda: Plan(DensityPeaks((4, 4)), 4, 8, scope="window"),
    "selection": lambda: Plan(TokenSelection("random"), 4, 8),
}


def image(height: int = 56, width: int = 72) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(encoder, x):
    with torch.no_grad():
        features = encoder(x)
    return features if isinstance(features, dict) else {"": features}


def apart(x, y) -> float:
    """The largest difference, relative to the largest value."""
    return max(float((x[name] - y[name]).abs().max() / y[name].abs().max()) for name in y)


class Permute(Reducer):
    """All tokens in another order, and where they lie."""

    on_grid = False

    def forward(self, tokens):
        height, width = tokens.shape[1:3]
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0)).to(tokens.device)
        places = torch.stack([order // width, order % width], dim=-1).unflatten(0, (height, width))
        permuted = tokens.flatten(1, 2)[:, order].view_as(tokens)

        def restore(refined):
            return refined.flatten(1, 2)[:, order.argsort()].view_as(tokens)

        return Reduction(permuted, places.expand(len(tokens), -1, -1, -1), None, restore)


# --- hooks ----------------------------------------------------------------------------------------------------------


def blocks_of(encoder) -> list[nn.Module]:
    return list(encoder.blocks) if hasattr(encoder, "blocks") else [b for stage in encoder.layers for b in stage.blocks]


PARTS = ("", "attn", "attn.qkv", "attn.proj", "norm1", "norm2", "mlp", "mlp.fc1")


@pytest.mark.parametrize(
    "make, plan",
    [(tiny_vit, plan) for plan in VIT_PLANS.values()] + [(tiny_swin, plan) for plan in SWIN_PLANS.values()],
    ids=[f"ViT, {name}" for name in VIT_PLANS] + [f"Swin, {name}" for name in SWIN_PLANS],
)
@pytest.mark.parametrize("when", ["before", "after, on the view", "after, on the model"])
def test_hooks_are_called_as_often_as_in_the_unmodified_model(make, plan, when):
    encoder, x = make(), image(64, 64) if make is tiny_vit else image(96, 128)
    expedited = None if when == "before" else hourglass.expedite(encoder, plan())
    calls: dict[tuple, int] = {}

    def count(key):
        def hook(module, inputs, output):
            assert isinstance(inputs[0], torch.Tensor)
            calls[key] = calls.get(key, 0) + 1

        return hook

    for i, block in enumerate(blocks_of(expedited if when == "after, on the view" else encoder)):
        for part in PARTS:
            block.get_submodule(part).register_forward_hook(count((i, part)))
    if expedited is None:
        expedited = hourglass.expedite(encoder, plan())
    run(encoder, x)
    expected = dict(calls)
    calls.clear()
    run(expedited, x)
    assert calls == expected and set(expected.values()) == {1}
    assert len(expected) == len(PARTS) * len(blocks_of(encoder))


def test_a_hook_that_would_not_be_called_is_refused():
    swin = tiny_swin()
    swin.layers[2].blocks[1].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="a hook on attn.attn_drop of Block would not be called"):
        hourglass.expedite(swin, Plan(attention="fast"))
    hourglass.expedite(swin, Plan())


# --- submodules that are others ---------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer with a low-rank update beside it, as LoRA has it, and an offset of its own."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(torch.tanh(self.down(x)))


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
@pytest.mark.parametrize("part", ["qkv", "proj"])
def test_any_module_can_stand_in_a_projections_place(make, part):
    """Fast attention fills cut windows with what the projection makes of zeros."""
    encoder, x = make(), image(52, 76)
    torch.manual_seed(2)
    for block in blocks_of(encoder):
        setattr(block.attn, part, LowRank(getattr(block.attn, part)))
    assert apart(run(hourglass.expedite(encoder, Plan(attention="fast")), x), run(encoder, x)) < 1e-5
    plan = Plan(Permute(), 0, 1, scope="window")
    assert apart(run(hourglass.expedite(encoder, plan), x), run(encoder, x)) < 1e-5


def test_a_quantised_encoder_runs():
    vit, x = tiny_vit(), image()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(vit), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.blocks[0].attn.qkv, nn.Linear)
    expected = run(quantised, x)
    assert apart(run(hourglass.expedite(quantised, Plan(attention="fast")), x), expected) < 0.1
    assert apart(run(hourglass.expedite(quantised, Plan(TokenClustering(0.6), 1, 4)), x), expected) < 1


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
@pytest.mark.parametrize("attention", ["fast", "plain"])
def test_a_reducer_of_ones_own_may_say_where_its_tokens_lie(make, attention):
    """Tokens in another order, in each window: the blocks do not mind."""
    encoder, x = make().double(), image(52, 100).double()
    start, stop = (1, 4) if make is tiny_vit else (2, 3)  # shifted windows would have others of them
    plan = Plan(Permute(), start, stop, scope="window", attention=attention)
    assert apart(run(hourglass.expedite(encoder, plan), x), run(encoder, x)) < 1e-6


def test_a_reducer_whose_windows_make_no_map_is_refused():
    with pytest.raises(InputError, match="Shuffle makes 1 x 16 tokens of a window of 4 x 4, and 1 x 12 of one that"):
        hourglass.expedite(tiny_vit(), Plan(Shuffle(), 1, 4, scope="window"))


# --- recomputing, compiling, sharding ---------------------------------------------------------------------------------


def fairscale_like(block: nn.Module) -> nn.Module:
    """What fairscale's ``checkpoint_wrapper`` makes of a block, in place."""

    def forward(original, module, *inputs):
        raise AssertionError("the view is not to call the block as it was")

    forward.__module__ = "fairscale.nn.checkpoint.checkpoint_activations"
    block.forward = functools.partial(forward, type(block).forward, weakref.ref(block))
    return block


@pytest.mark.parametrize("checkpointing", ["wrapper", "fairscale", "argument"])
def test_recomputed_blocks_stay_recomputed(checkpointing):
    """Each MLP runs twice in training, and gradients are those without recomputing."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plan, x = Plan(TokenClustering(0.6), 1, 4), image()
    gradients = []
    for recompute in (False, True):
        vit = tiny_vit(use_act_checkpoint=recompute and checkpointing == "argument").train()
        names = list(vit.state_dict())
        if recompute and checkpointing != "argument":
            wrap = fairscale_like if checkpointing == "fairscale" else checkpoint_wrapper
            for i, block in enumerate(vit.blocks):
                vit.blocks[i] = wrap(block)
        expedited = hourglass.expedite(vit, Plan(plan.reducer, 1, 4, attention="fast")).train()
        assert list(expedited.state_dict()) == names == list(vit.state_dict())
        calls = []
        for block in vit.blocks:
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        expedited(x)["last_feat"].square().sum().backward()
        assert len(calls) == 5 * (1 + recompute)
        gradients.append([parameter.grad for parameter in vit.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("compile_method", ["module", "in place", "block", "around"])
def test_what_is_compiled_already_is_refused(compile_method):
    vit = tiny_vit()
    model = nn.Sequential(vit)
    if compile_method == "module":
        model = nn.Sequential(torch.compile(vit, backend="eager"))
    elif compile_method == "in place":
        vit.compile(backend="eager")
    elif compile_method == "block":
        vit.blocks[1].compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(InputError, match="is compiled, and would run as it was: expedite the model first"):
        hourglass.expedite(model, Plan(attention="fast"))


def test_a_replaced_forward_pass_is_refused():
    vit = tiny_vit()
    vit.forward = functools.partial(type(vit).forward, vit)
    with pytest.raises(InputError, match="the forward pass of this ViT was replaced"):
        hourglass.expedite(vit, Plan(attention="fast"))


@pytest.mark.parametrize("wrapping", ["compiled", "replaced"])
@pytest.mark.parametrize("plan", [(SkipBlocks(), 4, 8), (None,)])
def test_what_stands_between_the_encoder_and_its_blocks_is_refused_too(wrapping, plan):
    swin = tiny_swin()
    stage = swin.layers[2]
    if wrapping == "compiled":
        stage.compile(backend="eager")
    else:
        stage.forward = functools.partial(type(stage).forward, stage)
    with pytest.raises(InputError, match="Stage.* (is compiled|was replaced), and would run as it was"):
        hourglass.expedite(swin, Plan(*plan, attention="fast"))


def test_another_reference_to_the_encoder_is_refused():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = tiny_vit()
            self.run = self.backbone.forward

    with pytest.raises(InputError, match="Detector holds ViT also in its attribute 'run'"):
        hourglass.expedite(Detector(), Plan())


def test_a_process_group(tmp_path):
    """DDP, and FSDP2 by block, on one process: the same result."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    vit, x = tiny_vit(), image()
    plan = Plan(TokenClustering(0.6), 1, 4)
    expected = run(hourglass.expedite(vit, plan), x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(hourglass.expedite(vit, plan))
        assert apart(run(parallel, x), expected) == 0
        assert apart(run(hourglass.expedite(nn.parallel.DistributedDataParallel(vit), plan), x), expected) == 0
        mesh = dist.init_device_mesh("cpu", (1,))
        expedited = hourglass.expedite(vit, plan)
        for block in expedited.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(expedited, mesh=mesh)
        assert apart(run(expedited, x), expected) < 1e-6
        expedited(x)["last_feat"].square().sum().backward()
        assert all(parameter.grad is not None for parameter in expedited.parameters())
        sharded = fully_shard(tiny_vit(), mesh=mesh)
        with pytest.raises(InputError, match="FSDPViT is sharded already: expedite the model first, then shard its"):
            hourglass.expedite(sharded, plan)
    finally:
        dist.destroy_process_group()


# --- what is shared ---------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.backbone = nn.ModuleDict({"net": encoder})
        self.head = nn.Linear(16, 3)
        self.lock = torch.multiprocessing.get_context("spawn").Lock()  # nothing that can be copied
        self.leaf = torch.ones(1, requires_grad=True) * 2  # nor is this

    def forward(self, x):
        return {"scores": self.head(self.backbone["net"](x)["last_feat"].mean((2, 3)))}


def test_everything_outside_the_blocks_is_the_same_modules():
    model, x = Detector(tiny_vit()), image()
    view = hourglass.expedite(model, Plan(TokenClustering(0.6), 1, 4))
    assert view.head is model.head
    assert find_encoder(view)[1].patch_embed is find_encoder(model)[1].patch_embed
    assert [*map(id, view.parameters())] == [*map(id, model.parameters())]
    before = run(view, x)
    # What is done to one later is done to the other.
    model.head.weight = nn.Parameter(torch.zeros_like(model.head.weight))
    model.head.bias.data.fill_(7)
    assert run(view, x)["scores"].eq(7).all()
    model.double()
    assert run(view, x.double())["scores"].dtype == torch.float64
    view.float()
    block = model.backbone["net"].blocks[1]
    block.attn.qkv = LowRank(block.attn.qkv)
    assert any("up" in name for name in view.state_dict())
    model.head.register_forward_hook(lambda *_: 2 * _[2])
    assert run(view, x)["scores"].eq(14).all()
    assert set(before) == {"scores"}


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
def test_views_can_be_copied_pickled_and_expedited_again(make, tmp_path):
    encoder, x = make(), image(64, 96)
    view = hourglass.expedite(nn.Sequential(encoder), Plan(TokenClustering(0.6), 1, 4))
    expected = run(view, x)
    torch.save(view, tmp_path / "view.pth")
    for again in (
        copy.deepcopy(view),
        pickle.loads(pickle.dumps(view)),
        torch.load(tmp_path / "view.pth", weights_only=False),
    ):
        assert apart(run(again, x), expected) == 0
        assert list(again.state_dict()) == list(view.state_dict())
        assert not {id(parameter) for parameter in again.parameters()} & {id(p) for p in view.parameters()}
        with torch.no_grad():  # a copy's blocks are its own
            next(iter(again.parameters())).zero_()
        assert apart(run(hourglass.expedite(again, Plan()), x), run(encoder, x)) > 0
    assert apart(run(view, x), expected) == 0
    assert apart(run(hourglass.expedite(view, Plan()), x), run(encoder, x)) == 0


@pytest.mark.parametrize("make", [ViT, Swin])
@pytest.mark.parametrize(
    "reducer", [TokenClustering(0.6), AveragePooling(0.6), DensityPeaks(0.6), GridMerging(0.6)], ids=str
)
def test_models_on_the_meta_device(make, reducer):
    arguments = TINY if make is ViT else TINY_SWIN
    scope = "map" if reducer.on_grid else "window"
    with torch.device("meta"):
        encoder = make(**arguments).eval()
        features = hourglass.expedite(encoder, Plan(reducer, 1, 4, scope=scope))(torch.empty(1, 3, 64, 96))
        expected = encoder(torch.empty(1, 3, 64, 96))
    assert {name: f.shape for name, f in features.items()} == {name: f.shape for name, f in expected.items()}


@pytest.mark.parametrize("make", [ViT, Swin])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "reducer",
    [
        TokenClustering(0.6),
        AveragePooling(0.6),
        DensityPeaks(0.6),
        GridMerging(0.6),
        BipartiteMatching(0.2),
        SkipBlocks(),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
def test_every_output_is_on_the_device(make, reducer, dtype):
    """As if on CUDA, without it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if make is Swin and reducer.takes_lists:
        pytest.skip("it takes no Swin")
    scope = "map" if reducer.on_grid and "window" in reducer.scopes or "window" not in reducer.scopes else "window"
    arguments = TINY if make is ViT else TINY_SWIN
    with torch.device("meta"):
        encoder = make(**arguments).eval().to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder = encoder.to_empty(device="cuda")
        for attention in ("fast", "plain"):
            expedited = hourglass.expedite(encoder, Plan(reducer, 1, 4, scope=scope, attention=attention))
            with torch.no_grad():
                features = expedited(torch.empty(1, 3, 64, 96, device="cuda", dtype=dtype))
            for feature in features.values():
                assert feature.device.type == "cuda" and feature.dtype == dtype


# --- encoders that others wrote ---------------------------------------------------------------------------------------


class WithNorm(ViT):
    """A final norm, and a second output."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        features = super().forward(x)
        last = self.norm(features["last_feat"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {"last_feat": last, "p6": F.max_pool2d(last, 2)}


class Scaled(Block):
    """LayerScale, which starts at one: as built, nothing shows."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gamma = nn.Parameter(torch.ones(16))

    def _run(self, tokens):
        tokens = tokens + self.gamma * (super()._run(tokens) - tokens)
        return tokens


class Normed(Attention):
    """Queries and keys with a norm."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens):
        size = tokens.shape[1:3]
        q, k, v = self.qkv(tokens).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return self.proj(mixed.transpose(1, 2).flatten(2).unflatten(1, size))


class Between(ViT):
    """Something of its own between two blocks."""

    def forward(self, x):
        tokens = self.patch_embed(x)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i == 2:
                tokens = tokens + 1
        return {"last_feat": tokens.permute(0, 3, 1, 2)}


class Several(ViT):
    """A map after each block."""

    def forward(self, x):
        tokens, features = self.patch_embed(x), {}
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            features[f"block{i}"] = tokens.permute(0, 3, 1, 2)
        return features


class Raw(ViT):
    """The maps after its blocks as they are."""

    def forward(self, x):
        tokens, maps = self.patch_embed(x), []
        for block in self.blocks:
            tokens = block(tokens)
            maps.append(tokens)
        return {"maps": maps}


class Backwards(ViT):
    def forward(self, x):
        tokens = self.patch_embed(x)
        for block in reversed(self.blocks):
            tokens = block(tokens)
        return {"last_feat": tokens.permute(0, 3, 1, 2)}


def filled(encoder):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval()


def test_a_subclass_with_a_forward_pass_of_its_own_keeps_it():
    encoder, x = filled(WithNorm(**TINY)), image()
    expected = run(encoder, x)
    assert apart(run(hourglass.expedite(encoder, Plan()), x), expected) == 0
    assert apart(run(hourglass.expedite(encoder, Plan(attention="fast")), x), expected) < 1e-5
    view = hourglass.expedite(encoder, Plan(TokenClustering(0.6), 1, 4))
    assert isinstance(view, WithNorm) and list(view.state_dict()) == list(encoder.state_dict())
    assert run(view, x).keys() == expected.keys() and apart(run(view, x), expected) > 1e-3


def with_blocks(kind: type) -> ViT:
    encoder = WithNorm(**TINY)  # no class that is known
    for i, block in enumerate(encoder.blocks):
        window = block.window_size
        replacement = kind(16, 2, 4.0, True, 0.0, nn.LayerNorm, nn.GELU, True, True, window, False, False, (8, 8))
        encoder.blocks[i] = replacement
    return encoder.eval()


def with_attention(kind: type) -> ViT:
    encoder = WithNorm(**TINY)
    for block in encoder.blocks:
        block.attn = kind(16, 2, True, False, True, (8, 8))
    return encoder.eval()


@pytest.mark.parametrize(
    "make",
    [lambda: with_blocks(Scaled), lambda: with_attention(Normed)],
    ids=["LayerScale", "norms of queries and keys"],
)
def test_a_block_that_gives_another_result_is_refused(make):
    encoder = make()
    with pytest.raises(
        InputError, match=r"WithNorm looks like ViT, but its block 0, a \w+ of windows of 4, gives another"
    ):
        hourglass.expedite(encoder, Plan(attention="fast"))
    with pytest.raises(InputError, match="It needs a family of its own"):
        hourglass.expedite(encoder, Plan(TokenClustering(0.6), 1, 4))
    assert not any(proof.holds for proof in hourglass.verify(encoder))
    hourglass.expedite(encoder, Plan())


def test_blocks_of_a_known_class_that_were_replaced_are_proven_too():
    encoder = tiny_vit()
    encoder.blocks[3] = with_blocks(Scaled).blocks[3]
    with pytest.raises(InputError, match="block 3, a Scaled of windows of 4, gives another"):
        hourglass.expedite(encoder, Plan(attention="fast"))


class Tempered(Block):
    """Its update is multiplied by a number, wherever that is kept."""

    def forward(self, tokens):
        kept = self._kept["factor"] if hasattr(self, "_kept") else self.factor
        factor = kept() if callable(kept) else float(kept)
        return tokens + factor * (super().forward(tokens) - tokens)


@pytest.mark.parametrize("kept", ["buffer", "attribute", "number", "list", "object"])
def test_blocks_that_differ_in_a_value_alone_are_of_two_kinds(kept):
    encoder = with_blocks(Tempered)
    once, twice = (lambda: 1.0), (lambda: 2.0)
    for i, block in enumerate(encoder.blocks):
        factor = torch.tensor(2.0 if i == 3 else 1.0)
        if kept == "buffer":
            block.register_buffer("factor", factor)
        elif kept == "list":
            block._kept = {"factor": factor, "others": [factor]}
        elif kept == "object":
            block.factor = twice if i == 3 else once
        else:
            block.factor = factor if kept == "attribute" else float(factor)
    assert [(proof.blocks, proof.holds) for proof in hourglass.verify(encoder)] == [
        ([0, 1], True),
        ([2, 4], True),
        ([3], False),
    ]
    with pytest.raises(InputError, match="block 3, a Tempered of windows of 4, gives another result"):
        hourglass.expedite(encoder, Plan(TokenClustering(0.6), 1, 3))


@pytest.mark.parametrize(
    "kind, plan, message",
    [
        (Between, (1, 4), "changes the map between blocks 2 and 3|uses the map after block 2"),
        (Several, (1, 4), "uses the map after block 1, and no plan may run blocks on fewer tokens across that"),
        (Raw, (1, 4), "returns the map after block 1, and no plan may run blocks on fewer tokens across that"),
        (Backwards, (1, 4), "does not call each of its blocks once and in order"),
    ],
)
def test_an_encoder_that_does_something_between_planned_blocks_is_refused(kind, plan, message):
    encoder = filled(kind(**TINY))
    with pytest.raises(InputError, match=message):
        hourglass.expedite(encoder, Plan(TokenClustering(0.6), *plan))


@pytest.mark.parametrize("kind, plan", [(Between, (3, 5)), (Between, (1, 3)), (Several, (3, 4))])
def test_what_it_does_elsewhere_stays(kind, plan):
    encoder, x = filled(kind(**TINY)), image()
    expected = run(encoder, x)
    actual = run(hourglass.expedite(encoder, Plan(Permute(), *plan, scope="window")), x)
    assert apart(actual, expected) < 1e-5
    assert apart(run(hourglass.expedite(encoder, Plan(attention="fast")), x), expected) < 1e-5


class CopiedBlock(SwinBlock):
    """Called as in Mask2Former's Swin: a list of tokens, the map's size on the block, a mask from the stage."""

    H = W = None

    def forward(self, x, mask):
        assert mask.shape == (1, self.H, self.W)
        return super().forward(x.unflatten(1, (self.H, self.W))).flatten(1, 2)


class CopiedStage(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.blocks = stage.blocks
        self.downsample = stage.downsample
        for block in self.blocks:
            block.__class__ = CopiedBlock

    def forward(self, x, height, width):
        mask = x.new_zeros(1, height, width)
        for block in self.blocks:
            block.H, block.W = height, width
            x = block(x, mask)
        if self.downsample is None:
            return x, height, width, x, height, width
        down = self.downsample(x.unflatten(1, (height, width)))
        return x, height, width, down.flatten(1, 2), *down.shape[1:3]


class CopiedSwin(nn.Module):
    """Two of four stages are output, under Mask2Former's names."""

    def __init__(self, swin):
        super().__init__()
        self.patch_embed, self.norm1, self.norm3 = swin.patch_embed, swin.norm1, swin.norm3
        self.layers = nn.ModuleList(CopiedStage(stage) for stage in swin.layers)
        self._out_features, self.out_indices = ["res3", "res5"], (0, 1, 2, 3)

    def forward(self, x):
        x = self.patch_embed(x)
        height, width = x.shape[2:]
        x, out = x.flatten(2).transpose(1, 2), {}
        for i, stage in enumerate(self.layers):
            stage_output, *size, x, height, width = stage(x, height, width)
            if i % 2:
                normed = getattr(self, f"norm{i}")(stage_output).unflatten(1, size)
                out[f"res{i + 2}"] = normed.permute(0, 3, 1, 2).contiguous()
        return out

    def train(self, mode=True):  # Mask2Former's returns nothing
        super().train(mode)


@pytest.mark.parametrize("plan", SWIN_PLANS.values(), ids=SWIN_PLANS)
def test_a_copy_of_swin_is_expedited_as_ours(plan):
    encoder, x = tiny_swin(), image(97, 131)
    copied, plan = CopiedSwin(tiny_swin()), plan()
    copied.eval()
    expected = run(hourglass.expedite(encoder, plan), x)
    view = hourglass.expedite(copied, plan).eval()
    features = run(view, x)
    assert list(features) == ["res3", "res5"]
    for name, expected_name in (("res3", "p1"), ("res5", "p3")):
        torch.testing.assert_close(features[name], expected[expected_name], atol=1e-5, rtol=1e-5)
        assert features[name].is_contiguous()


def test_a_model_without_an_encoder_is_told_what_it_has():
    class MaskFormer(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Conv2d(3, 3, 1)

    with pytest.raises(InputError, match="got MaskFormer with the backbone Conv2d, which has none: to add another"):
        hourglass.expedite(MaskFormer(), Plan())


def test_verify_tells_each_kind_of_block():
    proofs = hourglass.verify(nn.Sequential(tiny_vit()))
    assert [proof.blocks for proof in proofs] == [[0, 1, 3], [2, 4]]
    assert all(proof.holds and proof.difference < 1e-12 for proof in proofs)
    assert str(proofs[0]).endswith("Block of windows of 4, blocks 0-1, 3") and str(proofs[0]).startswith("equal")
    assert all(proof.holds for proof in hourglass.verify(hourglass.expedite(tiny_swin(), Plan(attention="fast"))))


def test_verify_refuses_what_has_no_values():
    with torch.device("meta"):
        vit = ViT(**TINY)
    with pytest.raises(InputError, match="ViT is on the meta device: its blocks cannot be run without values"):
        hourglass.verify(vit)


@pytest.mark.parametrize("plan", ["fast", "clustering", "windows", "matching", "selection"])
def test_segment_anythings_encoder(plan):
    modeling = pytest.importorskip("segment_anything.modeling.image_encoder")
    torch.manual_seed(0)
    encoder = modeling.ImageEncoderViT(
        img_size=128,
        patch_size=8,
        embed_dim=32,
        depth=5,
        num_heads=2,
        out_chans=16,
        window_size=6,
        global_attn_indexes=(2, 4),
        use_rel_pos=True,
        rel_pos_zero_init=False,
    )
    encoder, x = filled(encoder), image(128, 128)
    expected, view = run(encoder, x), hourglass.expedite(encoder, VIT_PLANS[plan]())
    features = run(view, x)[""]
    assert features.shape == expected[""].shape == (1, 16, 16, 16)  # after its neck
    if plan == "fast":
        assert apart({"": features}, expected) < 1e-5
    assert all(proof.holds for proof in hourglass.verify(encoder))
