import pytest
import torch

from hourglass import AveragePooling, TokenClustering
from hourglass.reduction.scope import EachWindow
from hourglass.reduction.windows import partition, unpartition


@pytest.mark.parametrize("size", [(8, 8), (7, 13), (1, 1), (4, 9)])
@pytest.mark.parametrize("window", [(4, 4), (3, 5), (1, 1)])
def test_windows_go_back_where_they_were(size, window):
    tokens = torch.randn(2, *size, 3)
    windows = partition(tokens, window)
    assert windows.shape[1:3] == window
    assert torch.equal(unpartition(windows, size), tokens)


def test_padding_holds_the_value_that_is_asked_for():
    windows = partition(torch.zeros(1, 1, 1, 1), (2, 2), value=7)
    assert windows.flatten().tolist() == [0, 7, 7, 7]


def test_each_window_is_reduced_on_its_own_and_cut_ones_without_padding():
    """10 x 6 tokens in windows of 4: two whole rows of windows and one of 2; one whole column and one of 2."""
    tokens = torch.randn(2, 10, 6, 3)
    reducer = AveragePooling((2, 2))
    reduction = EachWindow(reducer, 4)(tokens)
    assert reduction.tokens.shape == (2, 5, 3, 3)
    torch.testing.assert_close(reduction.tokens[:, 2:4, :2], reducer(tokens[:, 4:8, :4]).tokens)
    # The corner window has 2 x 2 tokens, and a token to stand for them.
    torch.testing.assert_close(reduction.tokens[:, 4, 2], tokens[:, 8:, 4:].mean((1, 2)))


@pytest.mark.parametrize("size", [(8, 8), (10, 6), (3, 17), (1, 1)])
def test_windows_that_change_nothing_give_the_map_back(size):
    tokens = torch.randn(2, *size, 3)
    reduction = EachWindow(TokenClustering((3, 2)), 4)(tokens)
    assert torch.equal(reduction.restore(reduction.tokens), tokens)
    assert reduction.sizes.shape == reduction.tokens.shape[:3]
    torch.testing.assert_close(reduction.sizes.sum((1, 2)), torch.full((2,), float(size[0] * size[1])))
