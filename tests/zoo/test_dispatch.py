import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.dispatch import Dispatcher


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(4, 7), st.integers(0, 2**31))
def test_tokens_come_back_weighted_from_their_own_experts(n_tokens, top_k, n_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, 3, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(n_experts, generator=generator)[:top_k] for _ in range(n_tokens)])
    weights = torch.rand(n_tokens, top_k, generator=generator, dtype=torch.float64)

    sent = Dispatcher().dispatch(x, chosen, n_experts=n_experts)
    assert sent.counts.tolist() == [(chosen == expert).sum().item() for expert in range(n_experts)]
    owners = torch.repeat_interleave(torch.arange(n_experts), sent.counts)
    y = sent.rows * (owners[:, None] + 1)  # expert e multiplies by e + 1
    got = Dispatcher().combine(y, sent, weights)

    want = torch.stack([sum(weights[n, s] * (chosen[n, s] + 1) * x[n] for s in range(top_k)) for n in range(n_tokens)])
    torch.testing.assert_close(got, want)
    tensors = [each.requires_grad_() for each in (y.detach(), weights)]
    assert torch.autograd.gradcheck(lambda y, w: Dispatcher().combine(y, sent, w), tensors)
