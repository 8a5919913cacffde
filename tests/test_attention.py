import pytest
import torch

from hourglass.attention import attend, read_table, resize_table


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reading_at_every_token_is_the_table_by_distance():
    table = draw(9, 3)
    read = read_table(table, extent=5, length=5, step=1)
    for q in range(5):
        for k in range(5):
            assert torch.equal(read[q, k], table[q - k + 4])


def test_reading_between_tokens_is_linear_in_the_distance():
    """A table whose rows are its distances, read at 3 tokens that lie 5 / 3 apart."""
    table = torch.arange(-4.0, 5.0)[:, None]
    read = read_table(table, extent=5, length=3, step=5 / 3)
    apart = 5 / 3
    expected = torch.tensor([[0, -apart, -2 * apart], [apart, 0, -apart], [2 * apart, apart, 0]])
    torch.testing.assert_close(read[..., 0], expected)


def test_distances_beyond_the_table_read_its_end():
    table = torch.arange(-1.0, 2.0)[:, None]
    assert read_table(table, extent=2, length=3, step=1.5)[..., 0].abs().max() == 1


def test_a_table_is_resized_only_where_its_size_differs():
    table = draw(9, 3)
    assert resize_table(table, 5) is table
    # Halfway between neighbours when the rows go from 2 to 1: their mean.
    assert torch.equal(resize_table(torch.tensor([[1.0], [3.0]]), 1), torch.tensor([[2.0]]))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("proportional", [True, False])
def test_attention_equals_plain_loops(relative, proportional):
    batch, heads, h, w, channels = 2, 2, 3, 2, 4
    q, k, v = (draw(batch, heads, h, w, channels, seed=i) for i in range(3))
    rel_h, rel_w = (draw(h, h, channels, seed=3), draw(w, w, channels, seed=4)) if relative else (None, None)
    log_sizes = draw(batch, h, w, seed=5) if proportional else None
    out = attend(q, k, v, rel_h, rel_w, log_sizes)
    places = [(y, x) for y in range(h) for x in range(w)]
    for b in range(batch):
        for n in range(heads):
            for y, x in places:
                scores = []
                for i, j in places:
                    score = q[b, n, y, x] @ k[b, n, i, j] / channels**0.5
                    if relative:
                        score += q[b, n, y, x] @ (rel_h[y, i] + rel_w[x, j])
                    if proportional:
                        score += log_sizes[b, i, j]
                    scores.append(score)
                weights = torch.stack(scores).softmax(0)
                expected = sum(weight * v[b, n, i, j] for weight, (i, j) in zip(weights, places, strict=True))
                torch.testing.assert_close(out[b, n, y, x], expected)


def test_a_key_of_size_two_counts_as_two_equal_keys():
    q, k, v = (draw(1, 1, 1, 2, 4, seed=i) for i in range(3))
    doubled = torch.cat([k, k[..., :1, :]], dim=3), torch.cat([v, v[..., :1, :]], dim=3)
    q3 = torch.cat([q, q[..., :1, :]], dim=3)
    sizes = torch.tensor([[[2.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, log_sizes=sizes.log()), attend(q3, *doubled)[..., :2, :])
