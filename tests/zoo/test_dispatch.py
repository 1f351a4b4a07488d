from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.dispatch import Dispatcher


@st.composite
def choices(draw):
    """Tokens, experts chosen for each, weights, and how many experts there are."""
    n_tokens, top_k, n_experts = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(4, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(n_tokens, 3, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(n_experts, generator=generator)[:top_k] for _ in range(n_tokens)])
    weights = torch.rand(n_tokens, top_k, generator=generator, dtype=torch.float64)
    return x, chosen, weights, n_experts


@settings(max_examples=30, deadline=None)
@given(choices())
def test_tokens_come_back_weighted_from_their_own_experts(case):
    x, chosen, weights, n_experts = case
    sent = Dispatcher().dispatch(x, chosen, n_experts=n_experts, weights=weights)
    assert sent.counts.tolist() == [(chosen == expert).sum().item() for expert in range(n_experts)]
    assert torch.equal(sent.load, sent.counts)
    owners = torch.repeat_interleave(torch.arange(n_experts), sent.counts)
    y = sent.rows * (owners[:, None] + 1)  # expert e multiplies by e + 1
    got = Dispatcher().combine(y, sent)

    want = (weights * (chosen + 1)).sum(dim=1, keepdim=True) * x
    torch.testing.assert_close(got, want)
    tensors = [each.requires_grad_() for each in (y.detach(), weights)]
    assert torch.autograd.gradcheck(lambda y, w: Dispatcher().combine(y, replace(sent, weights=w)), tensors)


@settings(max_examples=30, deadline=None)
@given(choices())
def test_each_copy_is_weighted_for_its_own_expert_on_the_way_there(case):
    x, chosen, weights, n_experts = case
    sent = Dispatcher().dispatch(x, chosen, n_experts=n_experts, weights=weights, early=True)
    assert torch.equal(sent.weights, torch.ones_like(weights))  # and not on the way back again
    start = 0
    for expert, count in enumerate(sent.counts.tolist()):
        tokens, slots = (chosen == expert).nonzero(as_tuple=True)
        want = x[tokens] * weights[tokens, slots][:, None]
        torch.testing.assert_close(sent.rows[start : start + count], want, rtol=0, atol=0)
        start += count
    tensors = [x.requires_grad_(), weights.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda x, w: Dispatcher().dispatch(x, chosen, n_experts=n_experts, weights=w, early=True).rows, tensors
    )
