"""Equal merges in rows and columns against loops."""

import pytest
import torch

from hourglass import GridMerging
from hourglass.reduction import lines
from hourglass.reduction.lines import merge_lines
from tests.reduction import references


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target", [1, 2, 5, 8, 12, 13])
@pytest.mark.parametrize("seed", range(3))
def test_lines_equal_the_reference(target, seed):
    features, sizes = draw(3, 13, 4, seed=seed), 1.0 + draw(3, 13, seed=seed + 50).abs()
    merged, merged_sizes, labels = merge_lines(features, sizes, target)
    assert merged.shape == (3, target, 4)
    for i in range(3):
        of_line = references.merge_line(features[i].tolist(), sizes[i].tolist(), target)
        assert labels[i].tolist() == of_line
        for j in range(target):
            members = [k for k in range(13) if of_line[k] == j]
            assert float(merged_sizes[i, j]) == pytest.approx(float(sizes[i, members].sum()))
            mean = (features[i, members] * sizes[i, members, None]).sum(0) / sizes[i, members].sum()
            torch.testing.assert_close(merged[i, j], mean)


def test_worked_out_by_hand():
    """Of 0, 0, 1, 5, 5, 9 the pairs of equal ones merge first; no token of a line passes another."""
    features = torch.tensor([0.0, 0.0, 1.0, 5.0, 5.0, 9.0])[None, :, None]
    assert merge_lines(features, torch.ones(1, 6), 4)[2].tolist() == [[0, 0, 1, 2, 2, 3]]
    merged, sizes, labels = merge_lines(features, torch.ones(1, 6), 3)
    assert labels.tolist() == [[0, 0, 0, 1, 1, 2]]
    torch.testing.assert_close(merged[0, :, 0], torch.tensor([1 / 3, 5.0, 9.0]))
    assert sizes.tolist() == [[3.0, 2.0, 1.0]]


def test_of_equal_costs_the_first_merge():
    assert merge_lines(torch.zeros(1, 6, 2), torch.ones(1, 6), 4)[2].tolist() == [[0, 0, 1, 1, 2, 3]]


@pytest.mark.parametrize(
    "size, grid", [((8, 6), (4, 3)), ((7, 9), (3, 9)), ((5, 5), (1, 1)), ((6, 6), (6, 6))], ids=str
)
def test_a_map_equals_the_reference(size, grid, monkeypatch):
    monkeypatch.setattr(lines, "CHANNELS", 10)  # all of them
    tokens = draw(2, *size, 3).float()
    reduction = GridMerging(grid)(tokens)
    assert reduction.tokens.shape == (2, *grid, 3) and reduction.positions is None
    for i in range(2):
        labels = references.merge_grid(tokens[i].double().tolist(), grid, lines.TURNS)
        flat, of_map = tokens[i].flatten(0, 1), [number for row in labels for number in row]
        for j in range(grid[0] * grid[1]):
            members = [k for k, number in enumerate(of_map) if number == j]
            torch.testing.assert_close(reduction.tokens[i].flatten(0, 1)[j], flat[members].mean(0))
            assert float(reduction.sizes[i].flatten()[j]) == len(members)
        change = torch.arange(float(grid[0] * grid[1])).view(1, *grid, 1).expand(2, -1, -1, 3)
        moved = reduction.restore(reduction.tokens + change) - tokens
        torch.testing.assert_close(moved[i, ..., 0].flatten(), torch.tensor(of_map).float(), atol=1e-4, rtol=0)


def test_neighbours_that_are_alike_become_one():
    """A map of four even quarters of unequal sizes: a grid of 2 x 2 finds them."""
    tokens = torch.zeros(1, 8, 8, 4)
    tokens[:, :3, :5, 0], tokens[:, :3, 5:, 1], tokens[:, 3:, :5, 2], tokens[:, 3:, 5:, 3] = 1, 1, 1, 1
    reduction = GridMerging((2, 2))(tokens)
    assert reduction.sizes[0].tolist() == [[15, 9], [25, 15]]
    torch.testing.assert_close(reduction.tokens[0].flatten(0, 1), torch.eye(4))


def test_merges_are_chosen_by_a_part_of_many_channels():
    tokens = torch.cat([draw(1, 6, 6, 64).float(), torch.zeros(1, 6, 6, 64)], dim=-1)
    mixed = torch.stack(tokens.chunk(2, dim=-1), dim=-1).flatten(-2)  # every second channel is 0
    expected = GridMerging((3, 3))(tokens[..., :64])
    torch.testing.assert_close(GridMerging((3, 3))(mixed).tokens[..., ::2], expected.tokens)


def test_gradients_pass():
    tokens = draw(1, 6, 6, 3).float().requires_grad_()
    reduction = GridMerging((3, 4))(tokens)
    reduction.restore(2 * reduction.tokens).square().sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
