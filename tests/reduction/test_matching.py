import pytest
import torch

from hourglass import BipartiteMatching
from hourglass.reduction import matching
from hourglass.reduction.matching import bipartite_matching
from hourglass.reduction.merging import merge, merge_sizes, unmerge
from tests import golden_cases
from tests.reduction import references


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class token"])
@pytest.mark.parametrize("r", [8, 32])
def test_golden(r, class_token):
    _, tensors = golden_cases.load("tome_n64")
    golden = golden_cases.under(tensors, f"r{r}{'_cls' if class_token else ''}/")
    x, size = tensors["x"], tensors["size"][..., 0]
    labels = bipartite_matching(tensors["metric"], r, class_token)
    n = golden["merged_mean"].shape[1]
    assert torch.equal(torch.nn.functional.one_hot(labels, n).transpose(1, 2).float(), golden["source"])
    mean = merge(x, labels, n)
    torch.testing.assert_close(mean, golden["merged_mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(mean * merge_sizes(torch.ones_like(size), labels, n)[..., None], golden["merged_sum"])
    torch.testing.assert_close(merge(x, labels, n, size), golden["wavg"], atol=1e-5, rtol=0)
    torch.testing.assert_close(merge_sizes(size, labels, n), golden["wavg_size"][..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(unmerge(mean, labels), golden["unmerged"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("class_token", [False, True], ids=["", "class token"])
@pytest.mark.parametrize("length", [1, 2, 3, 20, 31])
@pytest.mark.parametrize("r", [0, 1, 6, 100])
def test_equals_the_reference(length, r, class_token):
    metric = draw(2, length, 5, seed=length)
    labels = bipartite_matching(metric, r, class_token)
    for i in range(2):
        expected = references.bipartite_matching(metric[i], r, class_token)
        if r == 0 or length < 2 + class_token:  # nothing merges, and the order stays
            expected = list(range(length))
        assert labels[i].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_reference_where_tokens_tie(seed):
    """Directions along the axes: the cosines are 0 and 1, exactly."""
    metric = torch.eye(3)[torch.randint(0, 3, (1, 25), generator=torch.Generator().manual_seed(seed))]
    for r in (1, 5, 12):
        assert bipartite_matching(metric, r)[0].tolist() == references.bipartite_matching(metric[0], r)


def test_in_parts_as_in_one(monkeypatch):
    metric = draw(2, 41, 6)
    expected = bipartite_matching(metric, 13)
    monkeypatch.setattr(matching, "PAIRS", 50)
    assert torch.equal(bipartite_matching(metric, 13), expected)


@pytest.mark.parametrize("restore_mode", ["update", "features"])
def test_the_reduction_equals_the_reference(restore_mode):
    tokens, keys, positions = draw(1, 3, 5, 4).double(), draw(1, 3, 5, 6, seed=1).double(), draw(1, 3, 5, 2, seed=2)
    sizes = 1 + draw(1, 3, 5, seed=3).square()
    reducer = BipartiteMatching(4, restore_mode=restore_mode)
    n = reducer.remaining(15, 15)
    reduction = reducer(tokens, keys, sizes, positions, n)
    assert n == 11 and reduction.tokens.shape == (1, 1, 11, 4)

    labels = references.bipartite_matching(keys[0].flatten(0, 1), 4)
    weights = sizes.flatten().tolist()
    flat = tokens[0].flatten(0, 1)
    expected = torch.tensor(references.merged(flat, labels, weights)).double()
    torch.testing.assert_close(reduction.tokens[0, 0], expected)
    places = torch.tensor(references.merged(positions[0].flatten(0, 1), labels, weights))
    torch.testing.assert_close(reduction.positions[0, 0], places)
    of_label = [sum(w for w, value in zip(weights, labels) if value == label) for label in range(11)]
    torch.testing.assert_close(reduction.sizes[0, 0], torch.tensor(of_label))

    refined = draw(11, 4, seed=4).double()
    restored = refined[labels] if restore_mode == "features" else flat + (refined - expected)[labels]
    torch.testing.assert_close(reduction.restore(refined[None, None])[0].flatten(0, 1), restored)


def test_at_most_half_of_the_tokens_merge_at_a_time():
    reducer = BipartiteMatching(100)
    remaining = 256
    for expected in (156, 78, 39, 20, 10, 5, 3, 2, 1, 1):
        remaining = reducer.remaining(remaining, 256)
        assert remaining == expected


def test_a_share_is_of_the_unreduced_map():
    reducer = BipartiteMatching(0.25)
    assert reducer.remaining(64, 64) == 48 and reducer.remaining(48, 64) == 32
    assert BipartiteMatching(64).relative_to((16, 16)).remaining(64, 64) == 48
