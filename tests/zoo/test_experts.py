import pytest
import torch
import torch.nn.functional as F

from zoo.experts import Experts, grouped
from zoo.mlp import swiglu


def plain(rows, experts, counts):
    parts, start = [], 0
    for expert, count in enumerate(counts):
        x = rows[start : start + count]
        h = F.silu(x @ experts.gate[expert].t()) * (x @ experts.up[expert].t())
        parts.append(h @ experts.down[expert].t())
        start += count
    return torch.cat(parts)


def bank(dtype=torch.float64):
    torch.manual_seed(0)
    experts = Experts(n_experts=5, d_model=8, d_expert=16).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


@pytest.mark.parametrize("counts", [[3, 0, 4, 1, 2], [0, 0, 10, 0, 0], [0, 0, 0, 0, 0]])
def test_experts_equal_a_plain_loop_with_gradients(counts):
    experts = bank()
    rows = torch.randn(sum(counts), 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(counts), 8, dtype=torch.float64)
    tensors = [rows, *experts.parameters()]
    got = experts(rows, torch.tensor(counts))
    want = plain(rows, experts, counts)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((got * weights).sum(), tensors)
    expected = torch.autograd.grad((want * weights).sum(), tensors)
    for each, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-12)


def test_an_expert_without_rows_has_a_zero_gradient():
    experts = bank()
    rows = torch.randn(4, 8, dtype=torch.float64)
    experts(rows, torch.tensor([4, 0, 0, 0, 0])).sum().backward()
    assert experts.gate.grad[0].abs().sum() > 0
    assert experts.gate.grad[1:].abs().sum() == 0


def test_grouped_products_equal_the_loop():
    experts = bank(torch.bfloat16)
    rows = torch.randn(10, 8).bfloat16()
    counts = torch.tensor([3, 0, 4, 1, 2])
    ends = counts.cumsum(0).to(torch.int32)
    h = swiglu(grouped(rows, experts.gate, ends), grouped(rows, experts.up, ends))
    torch.testing.assert_close(grouped(h, experts.down, ends), experts(rows, counts), rtol=5e-2, atol=5e-1)
