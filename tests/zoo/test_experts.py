import pytest
import torch
import torch.nn.functional as F

from zoo.experts import Experts, grouped, looped


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_grouped_product_equals_the_loop(dtype):
    experts = bank(dtype)
    counts = [3, 0, 4, 1, 2]
    rows = torch.randn(10, 8, dtype=dtype)
    got = grouped(rows, experts.gate, torch.tensor(counts))
    torch.testing.assert_close(got, looped(rows, experts.gate, counts), rtol=2e-2, atol=2e-2)
