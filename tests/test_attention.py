import pytest
import torch

import hourglass.attention
from hourglass.attention import RelativeTables, attend, attend_at, attend_windows, read_table, resize_table


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


def plain_loops(q, k, v, bias):
    """Softmax attention of (B, N, L, C), ``bias(b, n, query, key)`` added to the scores."""
    out = torch.empty_like(q)
    batch, heads, length, channels = q.shape
    for b in range(batch):
        for n in range(heads):
            for i in range(length):
                scores = [q[b, n, i] @ k[b, n, j] / channels**0.5 + bias(b, n, i, j) for j in range(length)]
                out[b, n, i] = torch.stack(scores).softmax(0) @ v[b, n]
    return out


@pytest.fixture(params=[1 << 19, 30, 7, 1], ids="{} scores at a time".format)
def chunk(request, monkeypatch):
    """Chunks of everything, of some heads, of some queries, and of a query."""
    monkeypatch.setattr(hourglass.attention, "CHUNK", request.param)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("proportional", [True, False])
def test_attention_equals_plain_loops(relative, proportional, gradient, fast, chunk):
    batch, heads, h, w, channels = 2, 2, 3, 2, 4
    q, k, v = (draw(batch, heads, h, w, channels, seed=i).requires_grad_(gradient) for i in range(3))
    rel_h, rel_w = (draw(h, h, channels, seed=3), draw(w, w, channels, seed=4)) if relative else (None, None)
    log_sizes = draw(batch, h, w, seed=5) if proportional else None

    def bias(b, n, query, key):
        (y, x), (i, j) = divmod(query, w), divmod(key, w)
        of_place = q[b, n, y, x] @ (rel_h[y, i] + rel_w[x, j]) if relative else 0
        return of_place + (log_sizes[b, i, j] if proportional else 0)

    out = attend(q, k, v, rel_h, rel_w, log_sizes, fast)
    expected = plain_loops(*(x.flatten(2, 3) for x in (q, k, v)), bias).view_as(out)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == gradient


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("proportional", [True, False])
def test_attention_in_windows_equals_plain_loops(proportional, fast, chunk):
    count, heads, length, channels = 3, 2, 5, 4
    q, k, v = (draw(count, heads, length, channels, seed=i) for i in range(3))
    bias = draw(heads, length, length, seed=3)
    bias[:, 0, 2:] = -torch.inf
    log_sizes = draw(count, length, seed=5) if proportional else None
    out = attend_windows(q, k, v, bias, log_sizes, fast=fast)
    expected = plain_loops(
        q * channels**0.5, k, v, lambda b, n, i, j: bias[n, i, j] + (log_sizes[b, j] if proportional else 0)
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("proportional", [True, False])
def test_what_cuda_runs_in_windows_equals_the_formula(proportional):
    q, k, v = (draw(3, 2, 6, 4, seed=i) for i in range(3))
    bias, log_sizes = draw(2, 6, 6, seed=3), draw(3, 6, seed=4) if proportional else None
    bias[:, 1, 3:] = -torch.inf
    out = hourglass.attention._attend_windows_fused(q, k, v, bias, log_sizes)
    torch.testing.assert_close(out, attend_windows(q, k, v, bias, log_sizes))


def linear(table, entry):
    below = int(entry // 1)
    above = min(below + 1, len(table) - 1)
    return table[below] + (entry - below) * (table[above] - table[below])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("proportional", [True, False])
def test_attention_at_any_positions_equals_plain_loops(proportional, gradient, fast, chunk):
    batch, heads, length, channels, extent = 2, 2, 5, 4, (4, 3)
    q, k, v = (draw(batch, heads, length, channels, seed=i).requires_grad_(gradient) for i in range(3))
    tables = [draw(2 * side - 1, channels, seed=3 + axis) for axis, side in enumerate(extent)]
    positions = torch.rand(batch, length, 2, generator=torch.Generator().manual_seed(5)).double()
    positions = positions * (torch.tensor(extent) - 1)
    positions[:, :2] = positions[:, :2].round()
    log_sizes = draw(batch, length, seed=6) if proportional else None

    def bias(b, n, query, key):
        of_place = 0
        for axis, (table, side) in enumerate(zip(tables, extent)):
            at_query, at_key = float(positions[b, query, axis]), float(positions[b, key, axis])
            line = int(at_key // 1)
            for j, share in ((line, line + 1 - at_key), (min(line + 1, side - 1), at_key - line)):
                of_place += share * (q[b, n, query] @ linear(table, at_query - j + side - 1))
        return of_place + (log_sizes[b, key] if proportional else 0)

    out = attend_at(q, k, v, RelativeTables(*tables, extent), positions, log_sizes, fast)
    torch.testing.assert_close(out, plain_loops(q, k, v, bias), atol=1e-6, rtol=1e-6)
    assert out.requires_grad == gradient


@pytest.mark.parametrize("fast", [False, True])
def test_at_the_grids_positions_it_is_the_grids_attention(fast):
    """Of a whole map, of every second row and third column of one, and of a smaller map of cells that cut tokens."""
    for h, w, extent in ((5, 4, (5, 4)), (3, 2, (6, 6)), (5, 4, (8, 6))):
        step = (extent[0] / h, extent[1] / w)
        q, k, v = (draw(2, 3, h, w, 8, seed=i) for i in range(3))
        tables = [draw(2 * side - 1, 8, seed=3) for side in extent]
        log_sizes = draw(2, h, w, seed=4)
        grid = attend(q, k, v, *(read_table(*of) for of in zip(tables, extent, (h, w), step)), log_sizes)
        lines = [(torch.arange(n).double() + 0.5) * apart - 0.5 for n, apart in zip((h, w), step)]
        positions = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 1).expand(2, -1, -1)
        flat = (x.flatten(2, 3) for x in (q, k, v))
        out = attend_at(*flat, RelativeTables(*tables, extent), positions, log_sizes.flatten(1), fast)
        torch.testing.assert_close(out, grid.flatten(2, 3), atol=1e-6, rtol=1e-6)


def test_gradients_of_fast_attention_are_those_of_the_formula():
    inputs = [draw(2, 2, 3, 4, 8, seed=i) for i in range(3)] + [draw(3, 3, 8, seed=3), draw(4, 4, 8, seed=4)]
    gradients = []
    for fast in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        attend(*leaves, draw(2, 3, 4, seed=5), fast).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain)


def test_training_drops_attention_weights_in_either_way():
    q, k, v = (draw(1, 1, 4, 2, seed=i) for i in range(3))
    for fast in (False, True):
        torch.manual_seed(0)
        assert attend_windows(q, k, v, torch.zeros(1, 4, 4), dropout=1.0, fast=fast).abs().max() == 0


def test_fast_attention_never_holds_the_scores_of_all_pairs():
    """Of 2 heads x 1,024 tokens they would be 2 M; no tensor that is made is a quarter of that."""

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return out

    q, k, v = (torch.randn(1, 2, 32, 32, 8) for _ in range(3))
    rel_h, rel_w = torch.randn(32, 32, 8), torch.randn(32, 32, 8)
    with Sizes() as sizes:
        hourglass.attention._attend_chunked(q, k, v, rel_h, rel_w, torch.zeros(1, 32, 32))
    assert 0 < sizes.largest <= hourglass.attention.CHUNK


def test_a_key_of_size_two_counts_as_two_equal_keys():
    q, k, v = (draw(1, 1, 1, 2, 4, seed=i) for i in range(3))
    doubled = torch.cat([k, k[..., :1, :]], dim=3), torch.cat([v, v[..., :1, :]], dim=3)
    q3 = torch.cat([q, q[..., :1, :]], dim=3)
    sizes = torch.tensor([[[2.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, log_sizes=sizes.log()), attend(q3, *doubled)[..., :2, :])
