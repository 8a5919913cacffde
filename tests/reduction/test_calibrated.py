"""Calibrated restoring against its formula, with the reducer's mixture as an explicit matrix in float64."""

import pytest
import torch

import hourglass
from hourglass import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    GridMerging,
    InputError,
    LinearBlocks,
    TokenClustering,
)
from hourglass.reduction import SkipBlocks
from hourglass.reduction.calibrated import Calibrated, check_restoring
from hourglass.reduction.scope import in_scope

CHANNELS = 6
REDUCERS = {
    "clustering": TokenClustering((3, 3)),
    "pooling": AveragePooling((2, 4)),
    "peaks": DensityPeaks((3, 3)),
    "merging": GridMerging((3, 3)),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixture(reduction, tokens: torch.Tensor) -> torch.Tensor:
    """U (H W, h w), column by column from what restoring makes of a change of one reduced token."""
    count = reduction.tokens[0, ..., 0].numel()
    columns = []
    for i in range(count):
        change = torch.zeros_like(reduction.tokens)
        change.view(1, count, -1)[0, i, 0] = 1
        columns.append((reduction.restore(reduction.tokens + change) - tokens)[..., 0].flatten())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("rank", [CHANNELS, 2])
@pytest.mark.parametrize("form", ["detail", "full"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
def test_it_is_its_formula(reducer, window, form, rank):
    tokens = draw(1, 8, 6, CHANNELS)
    reducer = in_scope(reducer, window, like=tokens[0, 0, 0])
    d_map, x_map, u_map = (draw(CHANNELS, CHANNELS, seed=i) for i in (1, 2, 3))
    if form == "detail":
        x_map, u_map = torch.zeros_like(d_map), torch.zeros_like(d_map)
    basis = torch.linalg.qr(draw(CHANNELS, CHANNELS, seed=4))[0][:, :rank]
    constant = draw(CHANNELS, seed=5)
    tensors = {"tokens": (d_map + x_map) @ basis, "reduced": -(d_map + u_map) @ basis, "last": basis.T}
    if form == "full":
        tensors["refined"] = u_map @ basis
    calibrated = Calibrated(reducer, {0: {**tensors, "constant": constant}})

    reduction = reducer(tokens)
    refined = reduction.tokens + draw(*reduction.tokens.shape, seed=6)
    x, c, c_refined = (values.reshape(-1, CHANNELS) for values in (tokens, reduction.tokens, refined))
    u = mixture(reduction, tokens)
    update, detail = u @ (c_refined - c), x - u @ c
    expected = x + update + (detail @ d_map + x @ x_map + update @ u_map) @ basis @ basis.T + constant
    out = calibrated.run(tokens, [lambda tokens, place: refined], proportional=True)
    torch.testing.assert_close(out, expected.view_as(tokens))


@pytest.mark.parametrize("novelty, share", [(0.5, 1.0), (1.0, 1.0), (1.25, 0.75), (1.9, 0.1), (2.0, 0.0), (50.0, 0.0)])
def test_an_image_of_another_kind_is_corrected_less(novelty, share):
    """Novelty is the mean of |c W|^2; each image of a batch has its own."""
    reducer, tokens = AveragePooling((4, 4)), draw(2, 8, 8, CHANNELS)
    maps = {name: draw(CHANNELS, CHANNELS, seed=i) for i, name in enumerate(("tokens", "reduced", "refined"), start=1)}
    maps["constant"] = draw(CHANNELS, seed=4)
    reduced = reducer(tokens).tokens
    squares = reduced.square().sum(-1).mean((1, 2))
    tokens[1] *= (0.5 * squares[0] / squares[1]).sqrt()  # half as far out as the first
    whitening = torch.eye(CHANNELS, dtype=torch.float64) * (novelty / squares[0]).sqrt()

    def run(**tensors):
        blocks = [lambda tokens, place: 2 * tokens + 1]
        return Calibrated(reducer, {0: tensors}).run(tokens, blocks, proportional=True)

    plain = run(tokens=torch.zeros_like(maps["tokens"]), constant=torch.zeros_like(maps["constant"]))
    whole, out = run(**maps), run(**maps, whitening=whitening)
    of_second = min(1.0, max(0.0, 2 - novelty / 2))
    for i, of_image in enumerate((share, of_second)):
        torch.testing.assert_close(out[i], torch.lerp(plain[i], whole[i], of_image))


def test_in_the_place_of_blocks_it_is_an_affine_map():
    tokens, matrix, constant = draw(2, 4, 4, CHANNELS), draw(CHANNELS, CHANNELS, seed=1), draw(CHANNELS, seed=2)
    calibrated = Calibrated(SkipBlocks(), {3: {"tokens": matrix, "constant": constant}})

    def never(tokens, place):
        raise AssertionError("a block ran")

    out = calibrated.run(tokens, [never], proportional=True, first=3)
    torch.testing.assert_close(out, tokens + tokens @ matrix + constant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_follows_the_tokens_type(dtype):
    tokens = draw(1, 8, 8, CHANNELS).to(dtype)
    tensors = {"tokens": draw(CHANNELS, 2).float(), "reduced": draw(CHANNELS, 2).float(), "last": draw(2, CHANNELS)}
    calibrated = Calibrated(AveragePooling((4, 4)), {0: {**tensors, "constant": draw(CHANNELS)}})
    assert calibrated.run(tokens, [lambda tokens, place: tokens + 1], proportional=True).dtype == dtype


@pytest.mark.parametrize(
    "reducer, message",
    [
        (TokenClustering((3, 3), restore_mode="features"), 'which restores something else: use restore_mode="update"'),
        (AveragePooling((3, 3), restore_mode="features"), "TokenClustering|AveragePooling"),
        (BipartiteMatching(2), "got BipartiteMatching, which reduces anew in each block"),
    ],
)
def test_restoring_that_it_does_not_correct_is_refused(reducer, message):
    with pytest.raises(InputError, match=message):
        check_restoring(reducer, (8, 8), torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "reducer",
    [*REDUCERS.values(), TokenClustering((70, 8)), TokenClustering(0.5, k=4), SkipBlocks(), LinearBlocks()],
    ids=str,
)
def test_restoring_of_updates_is_taken(reducer, dtype):
    check_restoring(reducer, (8, 8), torch.zeros(8, dtype=dtype))


def test_an_affine_map_needs_its_calibration():
    from tests.small_vit import tiny_vit

    with pytest.raises(InputError, match="LinearBlocks needs a plan with a calibration"):
        hourglass.expedite(tiny_vit(), hourglass.Plan(LinearBlocks(), 1, 3))
