import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from zoo.activation import activate
from zoo.config_ff import Activation

GATED = [each for each in Activation if each is not Activation.gelu]


def gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain(gate, up, activation):
    """One number, as the papers and gpt-oss write it."""
    if activation is Activation.swiglu:
        return gate / (1 + math.exp(-gate)) * up
    if activation is Activation.geglu:
        return gelu(gate) * up
    gate, up = min(gate, 7.0), max(min(up, 7.0), -7.0)
    return (up + 1) * gate / (1 + math.exp(-1.702 * gate))


number = st.floats(-20, 20)


@pytest.mark.parametrize("activation", GATED)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(number, number), min_size=1, max_size=8))
def test_gated_kinds_equal_their_formulas(activation, pairs):
    gate, up = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    want = torch.tensor([plain(g, u, activation) for g, u in pairs], dtype=torch.float64)
    torch.testing.assert_close(activate(gate, up, activation), want, rtol=1e-12, atol=1e-12)


def test_gelu_is_that_of_gpt_2():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    got = activate(None, x, Activation.gelu)
    torch.testing.assert_close(got, torch.tensor([gelu(each) for each in x.tolist()], dtype=x.dtype))
    torch.testing.assert_close(got, ACT2FN["gelu_new"](x))


@pytest.mark.parametrize("activation", GATED)
def test_gradients_are_those_of_the_formula_on_both_sides_of_the_clamps(activation):
    torch.manual_seed(0)
    gate, up = (12 * torch.rand(2, 3, 40, dtype=torch.float64) * torch.tensor([[[1.0]], [[-1.0]]]) for _ in range(2))
    assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any()
    tensors = [gate.requires_grad_(), up.requires_grad_()]
    assert torch.autograd.gradcheck(lambda g, u: activate(g, u, activation), tensors)


@pytest.mark.parametrize("activation", GATED)
def test_backward_keeps_gate_and_up_alone_and_leaves_them_as_they_were(activation):
    kept = []
    gate, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    before = [gate.detach().clone(), up.detach().clone()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = activate(gate, up, activation)
    pull = torch.randn(4, 6)
    pulled = pull.clone()
    y.backward(pull)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1]) and torch.equal(pull, pulled)


def test_a_gate_goes_with_a_kind_that_has_one():
    with pytest.raises(AssertionError):
        activate(None, torch.randn(3), Activation.swiglu)
    with pytest.raises(KeyError):
        activate(torch.randn(3), torch.randn(3), Activation.gelu)
