import pytest
import torch

from hourglass import DensityPeaks
from hourglass.reduction import density
from hourglass.reduction.density import density_peaks, standardize
from tests.reduction import references


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 7, 29, 30])
@pytest.mark.parametrize("k", [2, 5, 50])  # not 1: mutual neighbours tie but for rounding
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_reference(n, k, seed):
    features = draw(2, 30, 4, seed=seed)
    labels, chosen = density_peaks(features, n, k)
    for i in range(2):
        assert (labels[i].tolist(), chosen[i].tolist()) == references.density_peaks(features[i], n, k)


@pytest.mark.parametrize("n", [1, 5, 12, 40])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_reference_where_tokens_tie(n, seed):
    """Small whole numbers: many tokens are alike, and as far apart as others, exactly."""
    features = torch.randint(0, 3, (1, 40, 2), generator=torch.Generator().manual_seed(seed)).float()
    labels, chosen = density_peaks(features, n, 3)
    assert (labels[0].tolist(), chosen[0].tolist()) == references.density_peaks(features[0], n, 3)


def test_of_tokens_that_are_all_alike_the_first_are_chosen():
    labels, chosen = density_peaks(torch.zeros(1, 6, 3), 2, 5)
    assert chosen.tolist() == [[0, 1]] and labels.tolist() == [[0, 1, 0, 0, 0, 0]]


def test_worked_out_by_hand():
    """Two tight groups on a line: the middle of each represents it."""
    features = torch.tensor([0.0, 1.0, 2.0, 20.0, 21.0, 22.0])[None, :, None]
    labels, chosen = density_peaks(features, 2, 2)
    assert chosen.tolist() == [[1, 4]] and labels.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_the_place_in_the_map_counts_as_far_as_it_is_told():
    """Tokens without features: with the spatial term each joins a representative near by."""
    tokens = torch.zeros(1, 3, 4, 2)
    assert torch.equal(standardize(tokens, 0.0), torch.zeros(1, 12, 4))
    places = standardize(tokens, 2.0)[0, :, 2:]
    assert places[0].tolist() == [0, 0] and places[5].tolist() == [2, 2] and places[11].tolist() == [4, 6]


def test_distances_do_not_depend_on_the_scale_of_features():
    tokens = draw(1, 6, 7, 8)
    for scale in (1e-2, 1e3):
        torch.testing.assert_close(standardize(5 + scale * tokens, 0.1), standardize(tokens, 0.1), atol=1e-3, rtol=1e-3)


def test_in_parts_as_in_one(monkeypatch):
    """No array of all pairs is needed: 35 tokens, 100 distances at a time."""
    features = draw(3, 35, 4)
    expected = density_peaks(features, 9, 5)
    monkeypatch.setattr(density, "PAIRS", 100)
    sizes = []
    original = density._squared_distances
    monkeypatch.setattr(
        density, "_squared_distances", lambda *args: sizes.append((result := original(*args)).numel()) or result
    )
    parts = density_peaks(features, 9, 5)
    assert max(sizes) <= 100
    for a, b in zip(expected, parts):
        assert torch.equal(a, b)


@pytest.mark.parametrize("restore_mode", ["update", "features"])
def test_the_reduction_equals_the_reference(restore_mode):
    tokens = draw(1, 4, 5, 3).double()
    reducer = DensityPeaks((2, 3), restore_mode=restore_mode)
    reduction = reducer(tokens)
    flat = tokens[0].flatten(0, 1)
    labels, chosen = references.density_peaks(standardize(tokens.float(), reducer.spatial)[0], 6, reducer.k)
    means = references.merged(flat, labels, [1.0] * 20)
    # In the smaller map they lie in bands: three by three from the top, each from the left to the right.
    order = [c for row in (0, 3) for c in sorted(range(row, row + 3), key=lambda c: (chosen[c] % 5, chosen[c] // 5))]
    expected = torch.tensor([means[c] for c in order]).double().view(1, 2, 3, 3)
    torch.testing.assert_close(reduction.tokens, expected)
    places = torch.tensor([[chosen[c] // 5, chosen[c] % 5] for c in order]).view(1, 2, 3, 2).float()
    assert torch.equal(reduction.positions, places)
    assert reduction.sizes.flatten().tolist() == [labels.count(c) for c in order]

    refined = draw(1, 2, 3, 3, seed=1).double()
    of_token = torch.stack([refined.view(6, 3)[order.index(label)] for label in labels])
    if restore_mode == "update":
        of_token = flat + of_token - torch.stack([expected.view(6, 3)[order.index(label)] for label in labels])
    torch.testing.assert_close(reduction.restore(refined), of_token.view(1, 4, 5, 3))


def test_all_tokens_are_the_map_itself():
    tokens = draw(2, 5, 3, 4)
    reduction = DensityPeaks((5, 3))(tokens)
    assert torch.equal(reduction.tokens, tokens)
    assert reduction.positions[0, 4, 2].tolist() == [4, 2] and reduction.sizes.eq(1).all()
    refined = draw(2, 5, 3, 4, seed=1)
    torch.testing.assert_close(reduction.restore(refined), refined)


def test_gradients_reach_all_tokens():
    tokens = draw(1, 4, 4, 3).requires_grad_()
    reduction = DensityPeaks((2, 2))(tokens)
    reduction.restore(3 * reduction.tokens).square().sum().backward()
    assert tokens.grad.ne(0).all()
