import re

import pytest
import torch
import torch.nn.functional as F

from hourglass.errors import InputError
from hourglass.reduction import AveragePooling, TokenClustering, clustering
from hourglass.reduction.clustering import AUTO_TEMPERATURE, mixture
from hourglass.reduction.neighborhoods import _neighborhoods as made
from hourglass.reduction.neighborhoods import neighborhoods
from hourglass.reduction.pooling import average_pool
from tests.golden_cases import load, names

CLUSTER_KEY = re.compile(r"it(\d+)_w(\d+)_t([\d.]+)$")
RESTORE_KEY = re.compile(r"k(\d+)_t([\d.]+)$")


def published(case: dict, key: str) -> TokenClustering:
    iterations, neighborhood, temperature = CLUSTER_KEY.match(key).groups()
    grid = case["kwargs"]["NUM_SPIXELS"]
    return TokenClustering.published(grid, int(iterations), int(neighborhood), float(temperature))


@pytest.mark.parametrize("name", names("expedit_cluster"))
def test_clustering_equals_the_authors(name):
    case, tensors = load(name)
    tokens = tensors["in/x"].permute(0, 2, 3, 1)
    keys = {key.split("/")[0] for key in tensors if CLUSTER_KEY.match(key.split("/")[0])}
    assert len(keys) >= 2
    for key in keys:
        centers = published(case, key)(tokens).tokens.flatten(1, 2)
        torch.testing.assert_close(centers, tensors[f"{key}/spixel_features"], atol=1e-4, rtol=0)
        labels = torch.cdist(tokens.flatten(1, 2).double(), centers.double()).argmin(-1)
        clear = tensors[f"{key}/label_margin"] >= 1e-4
        assert torch.equal(labels[clear], tensors[f"{key}/hard_labels"].long()[clear])


@pytest.mark.parametrize("name", names("expedit_cluster"))
def test_reconstruction_equals_the_authors(name):
    case, tensors = load(name)
    tokens = tensors["in/x"].permute(0, 2, 3, 1)
    compared = 0
    for key in {key.removesuffix("/out") for key in tensors if key.startswith("rec/") and key.endswith("/out")}:
        _, clustering, restoring = key.split("/")
        k, temperature = RESTORE_KEY.match(restoring).groups()
        # From the authors' centres, as theirs: five iterations' rounding would be amplified by the weights.
        shape = (len(tokens), *case["kwargs"]["NUM_SPIXELS"], -1)
        centers = tensors[f"{clustering}/spixel_features"].view(shape)
        mix = mixture(tokens, centers, float(temperature), int(k), neighborhood=None, weights="l2")
        restored = mix(tensors["rec/refined"].view(shape)).flatten(1, 2)
        clear = tensors[f"{key}/gap"] >= 1e-3
        torch.testing.assert_close(restored[clear], tensors[f"{key}/out"][clear], atol=1e-4, rtol=0)
        compared += int(clear.sum())
    assert compared > 100


@pytest.mark.parametrize("name", names("expedit_reconstruct"))
def test_reconstruction_of_ties_and_far_tokens_equals_the_authors(name):
    _, tensors = load(name)
    tokens, centers, refined = (tensors[part].unsqueeze(1) for part in ("feat", "sfeat", "refined"))
    for key in {key.removesuffix("/out") for key in tensors if key.endswith("/out")}:
        k, temperature = RESTORE_KEY.match(key).groups()
        mix = mixture(tokens, centers, float(temperature), int(k), neighborhood=None, weights="l2")
        torch.testing.assert_close(mix(refined)[:, 0], tensors[f"{key}/out"], atol=1e-5, rtol=0)


def reference(tokens, grid, iterations, neighborhood, temperature, k):
    """The default operators, as loops: centres, sizes and what restoring adds up for each token."""
    height, width, channels = tokens.shape
    h, w = grid
    radius = neighborhood // 2
    centers = F.adaptive_avg_pool2d(tokens.permute(2, 0, 1)[None], grid)[0].permute(1, 2, 0)
    home = {(y, x): (y * h // height, x * w // width) for y in range(height) for x in range(width)}
    if temperature == "auto":
        spread = torch.stack([(tokens[p] - centers[home[p]]).square().sum() for p in home]).mean()
        temperature = AUTO_TEMPERATURE / spread

    def near(p):
        y, x = home[p]
        return [(i, j) for i in range(h) for j in range(w) if abs(i - y) <= radius and abs(j - x) <= radius]

    sizes = None
    for _ in range(iterations):
        sums, sizes = torch.zeros_like(centers), torch.zeros(h, w, dtype=tokens.dtype)
        for p in home:
            distances = torch.stack([(tokens[p] - centers[c]).square().sum() for c in near(p)])
            for c, share in zip(near(p), (-temperature * distances).softmax(0)):
                sums[c] += share * tokens[p]
                sizes[c] += share
        centers = sums / sizes[..., None]

    def mix(refined):
        out = torch.zeros(height, width, refined.shape[-1], dtype=refined.dtype)
        for p in home:
            ranked = sorted(near(p), key=lambda c: float((tokens[p] - centers[c]).square().sum()))[:k]
            distances = torch.stack([(tokens[p] - centers[c]).square().sum() for c in ranked])
            for c, share in zip(ranked, (-temperature * distances).softmax(0)):
                out[p] += share * refined[c]
        return out

    return centers, sizes, mix


@pytest.mark.parametrize(
    "size, grid, neighborhood, temperature",
    [
        ((13, 9), (6, 5), 3, "auto"),
        ((24, 20), (17, 11), 5, 0.3),
        ((20, 31), (20, 13), 3, "auto"),
        ((7, 1), (3, 1), 5, "auto"),
        ((26, 26), (25, 25), 7, 1.0),
    ],
)
@pytest.mark.parametrize("part", [1 << 22, 1], ids=["at once", "in parts"])
def test_neighborhoods_equal_plain_loops(size, grid, neighborhood, temperature, part, monkeypatch):
    for module in ("neighborhoods", "clustering"):
        monkeypatch.setattr(f"hourglass.reduction.{module}.PART", part)
    tokens = torch.randn(2, *size, 4, generator=torch.Generator().manual_seed(0))
    refined = torch.randn(2, *grid, 4, generator=torch.Generator().manual_seed(1))
    reducer = TokenClustering(grid, iterations=2, neighborhood=neighborhood, temperature=temperature, k=4)
    reduction = reducer(tokens)
    restored = reduction.restore(refined)
    for b in range(2):
        centers, sizes, mix = reference(tokens[b].double(), grid, 2, neighborhood, temperature, k=4)
        torch.testing.assert_close(reduction.tokens[b].double(), centers, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reduction.sizes[b].double(), sizes, atol=1e-5, rtol=1e-5)
        expected = tokens[b].double() + mix(refined[b].double() - centers)
        torch.testing.assert_close(restored[b].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_centre_that_no_token_is_near_stays_where_it_was():
    """Two flat halves: the centres between them, pooled from both, are far from every token."""
    tokens = torch.zeros(1, 16, 16, 4)
    tokens[:, :, 8:] = 1.0
    tokens += 1e-4 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    grid = (11, 11)
    reduction = TokenClustering(grid)(tokens)
    empty = reduction.sizes < 1e-20
    assert empty.any() and not empty.all()
    torch.testing.assert_close(reduction.tokens[empty], average_pool(tokens, grid)[empty])
    assert reduction.restore(reduction.tokens + 1).isfinite().all()


def test_the_work_is_linear_in_the_tokens():
    def pairs(side: int, share: float = 0.72) -> int:
        cells = round(side * share)
        return neighborhoods((side, side), (cells, cells), 2, torch.device("cpu")).pairs

    for side in (64, 128, 256):
        assert pairs(2 * side) < 4.4 * pairs(side)
    # And nothing of tokens x centres is made on the way.
    made.cache_clear()
    TokenClustering(0.72)(torch.randn(1, 128, 128, 2))
    assert made.cache_info().currsize == 1


def test_the_published_form_keeps_what_was_chosen():
    """All that is at the constructor's defaults becomes as published; a published reducer is its own form."""
    assert TokenClustering((3, 3)).published_form().describe() == TokenClustering.published((3, 3)).describe()
    chosen = dict(iterations=4, neighborhood=11, temperature=0.01, restore_temperature=0.02, k=49)
    expected = TokenClustering.published((3, 3), **chosen)
    assert TokenClustering((3, 3), **chosen).published_form().describe() == expected.describe()
    assert expected.published_form() is expected
    with pytest.raises(InputError, match="published form"):
        AveragePooling((3, 3)).published_form()


@pytest.mark.parametrize("weights", ["sum", "l2"])
def test_all_candidates_are_compared_in_pieces(weights, monkeypatch):
    tokens, centers, refined = (torch.randn(2, *size, 4) for size in ((7, 5), (3, 4), (3, 4)))
    expected = mixture(tokens, centers, 0.3, k=5, neighborhood=None, weights=weights)(refined)
    for pairs in (1, 100):  # a token of both images, some tokens
        monkeypatch.setattr(clustering, "PAIRS", pairs)
        pieces = mixture(tokens, centers, 0.3, k=5, neighborhood=None, weights=weights)(refined)
        torch.testing.assert_close(pieces, expected)


@pytest.mark.parametrize("neighborhood", [3, None])
def test_the_mixtures_weights_are_constants_to_gradients(neighborhood):
    tokens, centers, refined = (torch.randn(1, *size, 4).requires_grad_() for size in ((7, 5), (3, 4), (3, 4)))
    mixture(tokens, centers, 0.3, k=5, neighborhood=neighborhood, weights="sum")(refined).sum().backward()
    assert tokens.grad is None and centers.grad is None
    assert refined.grad.sum() == pytest.approx(4 * 35, rel=1e-4)
