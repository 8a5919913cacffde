"""Everything on a CUDA device against the CPU's output: float32 and bfloat16, compiled and not."""

import copy

import pytest
import torch

import hourglass
from hourglass import AveragePooling, Plan, TokenClustering
from hourglass.attention import attend, attend_windows
from hourglass.encoders import SimpleFeaturePyramid
from tests import small_swin as of_swin
from tests import small_vit as of_vit
from tests.small_plans import FEWER

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Of the largest value of what is compared: TensorFloat-32 is off by default.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def assert_near(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    difference = (out.float().cpu() - expected.float()).abs()
    assert out.isfinite().all()
    if dtype == torch.float32:
        assert difference.max() <= TOLERANCE[dtype] * expected.abs().max()
    else:
        assert difference.mean() <= TOLERANCE[dtype] * expected.float().abs().mean()


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@DTYPES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("sizes", [False, True], ids=["", "proportional"])
@pytest.mark.parametrize("shape", [(1, 12, 32, 32, 64), (4, 16, 14, 14, 80), (2, 3, 9, 7, 32)], ids=str)
def test_attention_with_decomposed_positions(shape, sizes, fast, compiled, dtype):
    batch, _, h, w, channels = shape
    tensors = [draw(*shape, seed=i) for i in range(3)]
    tensors += [0.2 * draw(h, h, channels, seed=3), 0.2 * draw(w, w, channels, seed=4)]
    tensors += [draw(batch, h, w, seed=5)] if sizes else [None]
    expected = attend(*tensors)
    function = torch.compile(attend) if compiled else attend
    out = function(*(None if x is None else x.cuda().to(dtype) for x in tensors), fast=fast)
    assert_near(out, expected, dtype)


@DTYPES
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("sizes", [False, True], ids=["", "proportional"])
@pytest.mark.parametrize("shape", [(9, 6, 144, 32), (5, 3, 49, 32), (4, 2, 20, 16)], ids=str)
def test_attention_in_windows(shape, sizes, fast, dtype):
    count, heads, length, channels = shape
    q, k, v = (draw(*shape, seed=i) for i in range(3))
    q = q * channels**-0.5
    bias = draw(heads, length, length, seed=3)
    bias[:, : length // 2, length // 2 :] = -torch.inf
    log_sizes = draw(count, length, seed=4) if sizes else None
    expected = attend_windows(q, k, v, bias, log_sizes)
    on_device = [x.cuda().to(dtype) for x in (q, k, v, bias)]
    out = attend_windows(*on_device, None if log_sizes is None else log_sizes.cuda(), fast=fast)
    assert_near(out, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_fast_attention(dtype):
    inputs = [draw(2, 3, 8, 8, 32, seed=i) for i in range(3)] + [0.2 * draw(8, 8, 32, seed=i) for i in (3, 4)]
    gradients = []
    for device, of_dtype, fast in (("cpu", torch.float32, False), ("cuda", dtype, True)):
        leaves = [x.detach().clone().to(device, of_dtype).requires_grad_() for x in inputs]
        attend(*leaves, fast=fast).float().square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for expected, out in zip(*gradients, strict=True):
        assert_near(out, expected, dtype)


@DTYPES
@pytest.mark.parametrize(
    "reducer",
    [
        TokenClustering((20, 17)),
        TokenClustering((20, 17), iterations=5, neighborhood=7, candidates="all", restore_mode="features"),
        TokenClustering.published((20, 17)),
        AveragePooling((20, 17)),
    ],
    ids=["clustering", "all candidates", "published", "pooling"],
)
def test_reducers(reducer, dtype):
    tokens = draw(2, 32, 29, 64, seed=0)
    change = draw(2, 20, 17, 64, seed=1)
    expected, out = reducer(tokens), reducer(tokens.cuda().to(dtype))
    assert_near(out.tokens, expected.tokens, dtype)
    if expected.sizes is not None:
        assert_near(out.sizes, expected.sizes, dtype)
    assert_near(out.restore(out.tokens + change.cuda().to(dtype)), expected.restore(expected.tokens + change), dtype)


ENCODERS = {
    "vit": (of_vit.tiny_vit, {"fast attention": Plan(attention="fast"), **of_vit.PLANS}),
    "swin": (of_swin.tiny_swin, {"fast attention": Plan(attention="fast"), **of_swin.PLANS}),
}


def check_encoder(cpu: torch.nn.Module, cuda: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = cpu(image)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = cuda(image.cuda())
    for name in expected:
        assert_near(out[name], expected[name], dtype)


@DTYPES
@pytest.mark.parametrize("encoder, plan", [(name, plan) for name, (_, plans) in ENCODERS.items() for plan in plans])
def test_encoders(encoder, plan, dtype):
    make, plans = ENCODERS[encoder]
    cpu, cuda = (hourglass.expedite(model, plans[plan]) for model in (make(), make().cuda()))
    check_encoder(cpu, cuda, draw(2, 3, 120, 200, seed=0), dtype)


@pytest.mark.parametrize("attention", ["fast", "plain"])
@pytest.mark.parametrize("make", FEWER.values(), ids=FEWER)
def test_encoders_whose_tokens_are_chosen(make, attention):
    """In float64, so that rounding does not choose others."""
    models = []
    for vit in (of_vit.tiny_vit().double(), of_vit.tiny_vit().double().cuda()):
        plan = make()
        plan.attention = attention
        models.append(hourglass.expedite(vit, plan))
    check_encoder(*models, draw(2, 3, 120, 200, seed=0).double(), torch.float32)


@DTYPES
@pytest.mark.parametrize(
    "encoder, plan", [("vit", "fast attention"), ("vit", "clustering"), ("vit", "window"), ("swin", "window")]
)
def test_compiled_encoders(encoder, plan, dtype):
    torch._dynamo.reset()
    make, plans = ENCODERS[encoder]
    cpu, cuda = (hourglass.expedite(model, copy.deepcopy(plans[plan])) for model in (make(), make().cuda()))
    compiled = torch.compile(cuda, fullgraph=True)
    for size in ((128, 128), (120, 200)):
        check_encoder(cpu, compiled, draw(1, 3, *size, seed=0), dtype)


def test_an_expedited_backbone_trains_on_the_device():
    pyramid = SimpleFeaturePyramid(of_vit.tiny_vit(), "last_feat", 8, (2.0, 1.0, 0.5)).cuda()
    expedited = hourglass.expedite(pyramid, of_vit.PLANS["clustering"]).train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = sum(level.float().square().mean() for level in expedited(draw(2, 3, 64, 64, seed=0).cuda()).values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pyramid.parameters())
