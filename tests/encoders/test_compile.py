"""What torch.compile makes of expedited encoders: one graph, few times, and the same result."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import hourglass
from hourglass import AveragePooling, DensityPeaks, GridMerging, Plan, TokenClustering
from tests import small_swin as of_swin
from tests import small_vit as of_vit

# Of any shape: square or not, in whole windows or not, of even and odd numbers of patches.
SIZES = [(64, 64), (56, 104), (104, 64), (120, 88), (80, 160)]

VIT_PLANS = {
    "fast attention": Plan(attention="fast"),
    "clustering": Plan(TokenClustering((5, 5)), 1, 4),
    "share": Plan(TokenClustering(0.6), 1, 4),
    "published": Plan(TokenClustering((5, 5)), 1, 4, published=True, attention="fast"),
    "pooling": Plan(AveragePooling((5, 4)), 1),
    "merging": Plan(GridMerging((5, 4)), 1),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(encoder, plan: Plan, sizes: list[tuple[int, int]], graphs: int) -> None:
    """``fullgraph`` refuses a graph break. One graph is for the first size, one for all others."""
    expedited = hourglass.expedite(encoder, plan)
    counter = CompileCounter()
    compiled = torch.compile(expedited, backend=counter, fullgraph=True)
    with torch.no_grad():
        for height, width in sizes:
            image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
            expected, features = expedited(image), compiled(image)
            for name in expected:
                torch.testing.assert_close(features[name], expected[name], atol=1e-5, rtol=1e-5)
    assert 0 < counter.frame_count <= graphs


@pytest.mark.parametrize("plan", VIT_PLANS.values(), ids=VIT_PLANS)
def test_a_vit_compiles_once_for_all_sizes(plan):
    check(of_vit.tiny_vit(), plan, SIZES, graphs=2)


def test_representatives_of_the_whole_map_compile_once_for_all_sizes():
    check(of_vit.tiny_vit(window_block_indexes=()), Plan(DensityPeaks((5, 5)), 1, 4), SIZES, graphs=2)


def test_a_swin_compiles_once_for_all_sizes():
    check(of_swin.tiny_swin(), Plan(attention="fast"), SIZES, graphs=2)


@pytest.mark.parametrize("reducer", [TokenClustering((3, 3)), DensityPeaks((3, 3))], ids=["clustering", "peaks"])
@pytest.mark.parametrize("encoder", [of_vit.tiny_vit, of_swin.tiny_swin])
def test_under_scope_window_it_compiles_once_for_each_way_the_map_is_cut(encoder, reducer):
    """Maps in whole windows, however many."""
    start, stop, side = (1, 4, 32) if encoder is of_vit.tiny_vit else (4, 8, 96)
    plan = Plan(reducer, start, stop, scope="window")
    check(encoder(), plan, [(2 * side, 2 * side), (3 * side, 4 * side), (4 * side, 3 * side)], graphs=2)
    check(encoder(), plan, [(2 * side + side // 2, 3 * side)], graphs=1)


def test_an_operator_has_a_gradient_where_one_is_asked_for():
    encoder = of_vit.tiny_vit()
    plan = VIT_PLANS["clustering"]
    compiled = torch.compile(hourglass.expedite(encoder, plan), backend="aot_eager")
    image = torch.randn(1, 3, 64, 64)
    compiled(image)["last_feat"].square().sum().backward()
    gradient = encoder.blocks[2].attn.rel_pos_h.grad.clone()
    encoder.zero_grad()
    hourglass.expedite(encoder, plan)(image)["last_feat"].square().sum().backward()
    torch.testing.assert_close(encoder.blocks[2].attn.rel_pos_h.grad, gradient, atol=1e-4, rtol=1e-4)
