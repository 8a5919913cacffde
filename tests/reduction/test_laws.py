"""What every reducer obeys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hourglass import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    GridMerging,
    InputError,
    SkipBlocks,
    TokenClustering,
)

sides = st.integers(1, 19)


@st.composite
def maps(draw):
    """A batch of token maps and a grid that fits them."""
    height, width = draw(sides), draw(sides)
    grid = (draw(st.integers(1, height)), draw(st.integers(1, width)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    tokens = scale * torch.randn(draw(st.integers(1, 3)), height, width, draw(st.integers(1, 9)), generator=generator)
    return tokens, grid


@st.composite
def clusterings(draw, grid):
    return TokenClustering(
        grid,
        iterations=draw(st.integers(0, 3)),
        neighborhood=draw(st.sampled_from([1, 3, 5, 7])),
        temperature=draw(st.sampled_from(["auto", 0.01, 1.0])),
        k=draw(st.integers(1, 12)),
        candidates=draw(st.sampled_from(["neighborhood", "all"])),
        restore_mode=draw(st.sampled_from(["update", "features"])),
    )


def reducers(draw, grid):
    return [
        draw(clusterings(grid)),
        AveragePooling(grid, restore_mode="update"),
        AveragePooling(grid, restore_mode="features"),
        DensityPeaks(
            grid, k=draw(st.integers(1, 6)), spatial=draw(st.sampled_from([0, 0.1, 1.0])), restore_mode="update"
        ),
        DensityPeaks(grid, restore_mode="features"),
        GridMerging(grid, restore_mode="update"),
        GridMerging(grid, restore_mode="features"),
        SkipBlocks(),
    ]


@settings(max_examples=60, deadline=None)
@given(st.data(), maps())
def test_laws(data, drawn):
    tokens, grid = drawn
    for reducer in reducers(data.draw, grid):
        reduction = reducer(tokens)
        restored = reduction.restore(reduction.tokens)
        assert restored.shape == tokens.shape and restored.isfinite().all()

        # Middle blocks that change nothing give the input back, where the update is restored.
        if getattr(reducer, "restore_mode", "update") == "update":
            assert torch.equal(restored, tokens)

        # A constant map is reduced to the constant and comes back.
        constant = torch.full_like(tokens, 3.0)
        of_constant = reducer(constant)
        torch.testing.assert_close(of_constant.tokens, torch.full_like(of_constant.tokens, 3.0))
        torch.testing.assert_close(of_constant.restore(of_constant.tokens), constant)
        # A constant change reaches every token whole.
        if isinstance(reducer, TokenClustering | AveragePooling | DensityPeaks | GridMerging):
            moved = reduction.restore(torch.full_like(reduction.tokens, 2.0))
            if reducer.restore_mode == "features":
                torch.testing.assert_close(moved, torch.full_like(tokens, 2.0))
            added = reduction.restore(reduction.tokens + 2.0) - restored
            torch.testing.assert_close(added, torch.full_like(tokens, 2.0), atol=1e-3, rtol=1e-3)

        # Sizes share out the tokens.
        if reduction.sizes is not None:
            total = torch.full((len(tokens),), float(tokens.shape[1] * tokens.shape[2]))
            torch.testing.assert_close(reduction.sizes.sum((1, 2)), total, atol=1e-3, rtol=1e-4)

        # Images of a batch do not meet: permuting them permutes the result.
        order = data.draw(st.permutations(range(len(tokens))))
        permuted = reducer(tokens[order])
        torch.testing.assert_close(permuted.tokens, reduction.tokens[order], atol=1e-4, rtol=1e-4)
        changed = 2 * reduction.tokens
        torch.testing.assert_close(
            permuted.restore(changed[order]), reduction.restore(changed)[order], atol=1e-3, rtol=1e-3
        )


@settings(max_examples=30, deadline=None)
@given(maps())
def test_l2_weights_scale_a_constant(drawn):
    """k equal weights of unit L2 norm add up to sqrt(k): what the authors' code does to a constant map."""
    tokens, grid = drawn
    cells = grid[0] * grid[1]
    reduction = TokenClustering.published(grid, neighborhood=3, k=cells)(torch.full_like(tokens, 3.0))
    expected = torch.full_like(tokens, 3.0 * cells**0.5)
    torch.testing.assert_close(reduction.restore(reduction.tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reducer", [TokenClustering, AveragePooling, DensityPeaks, GridMerging])
def test_a_share_suits_maps_of_any_size(reducer):
    for size, grid in (((10, 20), (6, 12)), ((1, 3), (1, 2)), ((33, 7), (20, 4))):
        assert reducer(0.6)(torch.randn(1, *size, 2)).tokens.shape[1:3] == grid


@pytest.mark.parametrize("reducer", [TokenClustering((3, 3)), DensityPeaks((3, 3)), GridMerging((3, 3))], ids=str)
def test_a_reducer_keeps_nothing_between_calls(reducer):
    first, second = torch.randn(2, 1, 6, 6, 4)
    before = reducer(first)
    expected = before.restore(before.tokens + 1)
    reducer(second)
    assert torch.equal(before.restore(before.tokens + 1), expected)
    assert not list(reducer.parameters()) and not list(reducer.buffers())


RESTORING = (
    lambda **mode: TokenClustering((3, 4), **mode),
    lambda **mode: AveragePooling((3, 4), **mode),
    lambda **mode: DensityPeaks((3, 4), **mode),
    lambda **mode: GridMerging((3, 4), **mode),
    lambda **mode: BipartiteMatching(3, **mode),
)


@pytest.mark.parametrize("make", RESTORING)
def test_restore_is_the_former_name_of_restore_mode(make):
    assert make(restore="features").describe() == make(restore_mode="features").describe() != make().describe()
    for mode in ("update", "features"):
        with pytest.raises(InputError, match=f"restore_mode must be given once, got restore_mode='{mode}' and, by its"):
            make(restore_mode=mode, restore="update")
    with pytest.raises(InputError, match="restore_mode must be given once"):
        BipartiteMatching(3, "update", restore="update")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make(restored="update")


def test_descriptions_name_the_arguments():
    assert AveragePooling((3, 4)).describe() == {"name": "AveragePooling", "grid": [3, 4], "restore_mode": "update"}
    assert SkipBlocks().describe() == {"name": "SkipBlocks"}
    assert "k=10" in repr(TokenClustering(0.5))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AveragePooling((0, 4)), r"grid must be \(rows, columns\), each at least 1, or a share of them"),
        (lambda: AveragePooling(1.5), "got 1.5"),
        (lambda: AveragePooling(4), "got 4"),
        (lambda: AveragePooling("20"), "got '20'"),
        (
            lambda: AveragePooling((4, 4), restore_mode="copy"),
            "restore_mode must be 'update' or 'features', got 'copy'",
        ),
        (lambda: TokenClustering((4, 4), iterations=-1), "iterations must be a whole number of at least 0, got -1"),
        (lambda: TokenClustering((4, 4), neighborhood=4), "neighborhood must be an odd number of cells a side, got 4"),
        (lambda: TokenClustering((4, 4), temperature=0), 'temperature must be a number over 0 or "auto", got 0'),
        (lambda: TokenClustering((4, 4), restore_temperature="warm"), "restore_temperature must be .* got 'warm'"),
        (lambda: TokenClustering((4, 4), k=0), "k must be a whole number of at least 1, got 0"),
        (lambda: TokenClustering((4, 4), weights="max"), "weights must be 'sum' or 'l2', got 'max'"),
        (lambda: TokenClustering((4, 4), candidates="some"), "candidates must be 'neighborhood' or 'all', got 'some'"),
        (lambda: DensityPeaks((4, 4), k=0), "k must be a whole number of at least 1, got 0"),
        (lambda: DensityPeaks((4, 4), spatial=-1), "spatial must be a number of at least 0, got -1"),
        (lambda: DensityPeaks((4, 4), restore_mode="copy"), "restore_mode must be 'update' or 'features', got 'copy'"),
        (
            lambda: BipartiteMatching(-1),
            r"r must be a number of tokens of at least 0, or a share of them in \[0, 0.5\]",
        ),
        (lambda: BipartiteMatching(0.6), "got 0.6"),
        (lambda: BipartiteMatching("half"), "got 'half'"),
        (lambda: BipartiteMatching(3, restore_mode="copy"), "restore_mode must be 'update' or 'features', got 'copy'"),
        (
            lambda: BipartiteMatching(9).relative_to((4, 4)),
            "r must be at most half of the 16 tokens of a window, got 9",
        ),
        (lambda: TokenClustering((4, 4))(torch.zeros(1, 3, 9, 2)), "which has 3 x 9 tokens"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()
