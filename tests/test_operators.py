import pytest
import torch

from hourglass.operators import needs_gradient, operator


@operator("Tensor[] parts, int times", lambda parts, times: [parts[0].shape[0] * times])
def _tests_repeated_sum(parts: list[torch.Tensor], times: int) -> torch.Tensor:
    return sum(parts).repeat(times)


def test_an_operator_is_one_step_of_a_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x = torch.arange(3.0)
    compiled = torch.compile(lambda x: _tests_repeated_sum([x, x], 2), backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.tensor([0.0, 2.0, 4.0] * 2))
    assert graphs == [[torch.ops.hourglass.tests_repeated_sum]]


def test_a_gradient_goes_through_the_function_itself():
    x = torch.arange(3.0).requires_grad_()
    _tests_repeated_sum([x, x], 2).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))


@pytest.mark.parametrize("values, expected", [((1, None), False), ((torch.ones(1),), False)])
def test_what_needs_a_gradient(values, expected):
    leaf = torch.ones(1, requires_grad=True)
    assert needs_gradient(*values) is expected
    assert needs_gradient(*values, leaf) and needs_gradient(*values, [1, leaf])
    with torch.no_grad():
        assert not needs_gradient(*values, leaf)


def test_the_fake_result_has_the_real_ones_shape():
    parts = [torch.ones(3, device="meta")]
    assert torch.ops.hourglass.tests_repeated_sum(parts, 4).shape == (12,)
