import pytest
import torch

from zoo.activation import GATED, activate
from zoo.config_ff import Activation, MoEConfig, RouterConfig, Score
from zoo.experts import Experts, grouped_is_faster, ownership

KINDS = pytest.mark.parametrize("activation", list(GATED))
BIAS = pytest.mark.parametrize("bias", [False, True])


def bank(activation=Activation.swiglu, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    router = RouterConfig(score=Score.softmax, normalize=True, scale=1.0)
    config = MoEConfig(n_experts=5, top_k=2, d_expert=16, d_shared=0, router=router, activation=activation, bias=bias)
    experts = Experts(config, d_model=8).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def plain(rows, experts, owners):
    """One row after another."""
    results = [rows[:0]]
    for x, e in zip(rows, owners, strict=True):
        gate, up = experts.gate[e] @ x, experts.up[e] @ x
        if experts.gate_bias is not None:
            gate, up = gate + experts.gate_bias[e], up + experts.up_bias[e]
        y = experts.down[e] @ activate(gate, up, experts.activation)
        results.append((y if experts.down_bias is None else y + experts.down_bias[e])[None])
    return torch.cat(results)


def owners(counts):
    return [expert for expert, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("counts", [[3, 0, 4, 1, 2], [0, 0, 10, 0, 0], [0, 0, 0, 0, 0]])
@KINDS
@BIAS
def test_experts_equal_one_row_after_another_with_gradients(counts, activation, bias):
    experts = bank(activation, bias)
    rows = (3 * torch.randn(sum(counts), 8, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(sum(counts), 8, dtype=torch.float64)
    got = experts(rows, torch.tensor(counts))
    want = plain(rows, experts, owners(counts))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    named = {"rows": rows, **dict(experts.named_parameters())}
    assert len(named) == (7 if bias else 4)
    grads = torch.autograd.grad((got * weights).sum(), list(named.values()))
    expected = torch.autograd.grad((want * weights).sum(), list(named.values()), materialize_grads=True)
    for name, each, other in zip(named, grads, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@BIAS
def test_an_expert_without_rows_has_a_zero_gradient(bias):
    experts = bank(bias=bias)
    rows = torch.randn(4, 8, dtype=torch.float64)
    experts(rows, torch.tensor([4, 0, 0, 0, 0])).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1:].abs().sum() == 0


@KINDS
@BIAS
def test_grouped_products_equal_the_loop_with_gradients(activation, bias):
    experts = bank(activation, bias, torch.float32)
    counts = torch.tensor([3, 0, 4, 1, 2])
    rows = torch.randn(10, 8).requires_grad_()
    pull = torch.randn(10, 8)
    tensors = [rows, *experts.parameters()]
    results = []
    for experts.grouped in (False, True):
        y = experts(rows, counts)
        results.append([y, *torch.autograd.grad((y * pull).sum(), tensors)])
    for loop, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, loop, rtol=1e-5, atol=1e-4)


@KINDS
@BIAS
@pytest.mark.parametrize("grouped", [False, True])
def test_bf16_is_near_float64(activation, bias, grouped):
    experts = bank(activation, bias, torch.float32)
    for parameter in experts.parameters():
        parameter.data = (0.4 * parameter.data).bfloat16().float()
    experts.grouped = grouped
    counts, rows = torch.tensor([3, 0, 4, 1, 2]), torch.randn(10, 8).bfloat16()
    got = experts(rows, counts)
    assert got.dtype is torch.bfloat16
    want = plain(rows.double(), experts.double(), owners(counts.tolist()))
    assert (got.double() - want).norm() < 2e-2 * want.norm()


def test_rows_past_the_last_expert_get_no_bias():
    owned = ownership(torch.tensor([2, 2, 3], dtype=torch.int32), torch.empty(4, 7))
    assert owned.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_grouped_products_are_for_bf16_on_cuda_in_whole_16_bytes():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert grouped_is_faster(cuda, torch.bfloat16, widths=[16, 8])
    assert not grouped_is_faster(cuda, torch.bfloat16, widths=[16, 4])
    assert not grouped_is_faster(cuda, torch.float32, widths=[16, 8])
    assert not grouped_is_faster(cpu, torch.bfloat16, widths=[16, 8])
