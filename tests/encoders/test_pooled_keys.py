"""Global attention to cells of tokens, against plain loops in float64."""

import math

import pytest
import torch
from torch import nn

import hourglass
from hourglass import AveragePooling, InputError, Plan
from hourglass.attention import rotate
from hourglass.encoders.vit.placed import ViTAttention, _cell_attention
from tests.models import placed
from tests.small_swin import tiny_swin
from tests.small_vit import image, last, tiny_vit


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cells_of(length: int, cell: int) -> list[list[int]]:
    return [list(range(first, min(first + cell, length))) for first in range(0, length, cell)]


def reference(qkv: nn.Linear, tokens, tables, heads: int, cell: int) -> torch.Tensor:
    """(H, W, C) of one image: queries of all tokens, keys and values of the means of cells."""
    height, width, channels = tokens.shape
    rows, columns = cells_of(height, cell), cells_of(width, cell)
    means = [tokens[row][:, column].mean((0, 1)) for row in rows for column in columns]
    sizes = [len(row) * len(column) for row in rows for column in columns]
    q = qkv(tokens)[..., :channels]
    k, v = (torch.stack([qkv(mean) for mean in means])[:, (1 + i) * channels : (2 + i) * channels] for i in range(2))
    out, side = torch.zeros_like(tokens), channels // heads
    for head in range(heads):
        part = slice(head * side, (head + 1) * side)
        for y in range(height):
            for x in range(width):
                query, scores = q[y, x, part], []
                for i, (row, column) in enumerate((row, column) for row in rows for column in columns):
                    score = query @ k[i, part] / math.sqrt(side) + math.log(sizes[i])
                    score = score + torch.stack([query @ tables[0][y - j + height - 1] for j in row]).mean()
                    score = score + torch.stack([query @ tables[1][x - j + width - 1] for j in column]).mean()
                    scores.append(score)
                out[y, x, part] = torch.stack(scores).softmax(0) @ v[:, part]
    return out


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("height, width, cell", [(4, 6, 2), (5, 7, 2), (5, 4, 3), (3, 3, 8)])
def test_it_is_plain_loops(height, width, cell, bias, fast):
    channels, heads = 8, 2
    qkv = nn.Linear(channels, 3 * channels, bias=bias).double()
    tokens = draw(2, height, width, channels)
    tables = [draw(2 * side - 1, channels // heads, seed=i) for i, side in enumerate((height, width), start=1)]
    attention = object.__new__(ViTAttention)
    nn.Module.__init__(attention)
    attention.qkv = qkv
    q, kv = attention.project_to_cells(tokens, cell)
    out = _cell_attention(q, kv, [*tables, None], [heads, cell, int(fast)])
    expected = torch.stack([reference(qkv, image_tokens, tables, heads, cell) for image_tokens in tokens])
    torch.testing.assert_close(out, expected)


def test_rotary_keys_lie_at_their_cells_centres():
    q, kv, frequencies = draw(1, 5, 4, 8), draw(1, 3, 2, 16, seed=1), draw(2, 1, seed=2)
    out = _cell_attention(q, kv, [None, None, frequencies], [2, 2, 0])
    cell_centers = torch.tensor([[y, x] for y in (0.5, 2.5, 4.0) for x in (0.5, 2.5)], dtype=torch.float64)
    sizes = torch.tensor([4.0, 4, 4, 4, 2, 2], dtype=torch.float64)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        k, v = kv[0, ..., :8].reshape(6, 8)[:, part], kv[0, ..., 8:].reshape(6, 8)[:, part]
        for y in range(5):
            for x in range(4):
                query = rotate(q[0, y, x, part], torch.tensor([y, x]), frequencies)
                scores = rotate(k, cell_centers, frequencies) @ query / 2 + sizes.log()
                torch.testing.assert_close(out[0, y, x, part], scores.softmax(0) @ v)


def test_a_projection_that_is_more_than_a_product_is_called_once():
    """A hook sees it as in the unmodified model, and the result is the same."""
    vit = tiny_vit()
    view = hourglass.expedite(vit, Plan(keys=2))
    expected = last(view, image())
    calls = []
    handle = next(block for block in vit.blocks if block.window_size == 0).attn.qkv.register_forward_hook(
        lambda module, inputs, output: calls.append(output.shape)
    )
    torch.testing.assert_close(last(view, image()), expected)
    assert len(calls) == 1 and calls[0][-1] % 3 == 0
    handle.remove()


@pytest.mark.parametrize("attention", ["fast", "plain"])
def test_only_global_blocks_outside_the_plan_pool(attention):
    vit = tiny_vit()
    pooled = hourglass.expedite(vit, Plan(AveragePooling((4, 4)), 1, 3, keys=2, attention=attention))
    keys = [
        getattr(block.attn, "attention_options", None) and block.attn.attention_options.keys for block in pooled.blocks
    ]
    windows = [block.window_size for block in vit.blocks]
    for i, (number, window) in enumerate(zip(keys, windows)):
        assert number in ((2,) if window == 0 and i not in (1, 2) else (1, None)), (i, keys)
    assert 2 in keys
    plain = hourglass.expedite(vit, Plan(AveragePooling((4, 4)), 1, 3, attention=attention))
    assert not torch.allclose(last(pooled, image()), last(plain, image()))


def test_cells_of_one_token_are_the_tokens():
    vit = tiny_vit()
    block = next(block for block in vit.blocks if block.window_size == 0)
    view = placed(vit, block, fast=True)
    tokens = torch.randn(2, 6, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = view.attn
        q, kv = attention.project_to_cells(tokens, 1)
        tables = [*(attention.tables() or (None, None)), None]
        out = attention.proj(_cell_attention(q, kv, tables, [attention.num_heads, 1, 1]))
        torch.testing.assert_close(out, block.attn(tokens), atol=1e-6, rtol=1e-5)


def test_it_compiles_to_one_graph_and_has_gradients():
    vit = tiny_vit()
    view = hourglass.expedite(vit, Plan(keys=3))
    expected = last(view, image())
    torch._dynamo.reset()
    compiled = torch.compile(view, backend="eager", fullgraph=True)
    torch.testing.assert_close(last(compiled, image()), expected, atol=1e-5, rtol=1e-5)
    view(image())["last_feat"].sum().backward()
    assert all(parameter.grad is not None for parameter in vit.parameters())


@pytest.mark.parametrize(
    "make, plan, message",
    [
        (tiny_swin, lambda: Plan(keys=2), "keys needs an encoder with global attention, got keys=2 and a Swin"),
        (
            lambda: tiny_vit(window_block_indexes=range(5)),
            lambda: Plan(keys=2),
            "a block of global attention, got none",
        ),
        (tiny_vit, lambda: Plan(AveragePooling((4, 4)), keys=2), "global attention outside blocks 0 to"),
        (tiny_vit, lambda: Plan(keys=0), "keys must be a whole number of at least 1, got 0"),
        (tiny_vit, lambda: Plan(keys=True), "keys must be a whole number"),
    ],
)
def test_what_has_no_keys_to_pool_is_refused(make, plan, message):
    with pytest.raises(InputError, match=message):
        hourglass.expedite(make(), plan())


def test_a_plan_says_its_keys():
    assert Plan(keys=2).describe()["keys"] == 2 and "keys=2" in repr(Plan(keys=2))
    assert "keys" not in Plan().describe() and Plan(keys=2).attention == "fast"
    assert Plan(AveragePooling((4, 4)), keys=2).control().keys == 2
