import pytest
import torch

from benchmarks.dense_clustering import DenseClustering
from hourglass import TokenClustering


@pytest.mark.parametrize("size, grid", [((20, 17), (13, 11)), ((16, 16), (16, 16)), ((9, 30), (1, 30))])
def test_what_the_linear_clustering_is_timed_against_gives_the_same(size, grid):
    tokens = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(0))
    refined = torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(1))
    clustering = TokenClustering.published(grid, iterations=3, neighborhood=5, temperature=0.1, k=4)
    expected, dense = clustering(tokens), DenseClustering(clustering)(tokens)
    torch.testing.assert_close(dense.tokens, expected.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dense.restore(refined), expected.restore(refined), atol=1e-4, rtol=1e-4)
