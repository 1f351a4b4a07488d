import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.loss import cross_entropy


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 23), st.integers(1, 30), st.integers(2, 17), st.floats(0, 1), st.integers(0, 2**31))
def test_chunked_loss_and_gradients_equal_the_plain_ones(n_tokens, chunk, vocab, masked, seed):
    torch.manual_seed(seed)
    h = torch.randn(n_tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab, (n_tokens,)).where(torch.rand(n_tokens) >= masked, -100)

    got = cross_entropy(h, weight, targets, chunk=chunk)
    want = F.cross_entropy(h @ weight.t(), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got * 0.37, [h, weight])
    expected = torch.autograd.grad(want * 0.37, [h, weight])
    for each, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-12)


def test_loss_of_bf16_states_is_summed_in_fp32():
    torch.manual_seed(0)
    h, weight = torch.randn(64, 16).bfloat16(), torch.randn(100, 16)
    targets = torch.randint(0, 100, (64,))
    loss = cross_entropy(h, weight, targets, chunk=16)
    assert loss.dtype is torch.float32
    logits = h.double() @ weight.bfloat16().double().t()
    # 1e-3: where the machine multiplies bf16 itself, the logits are rounded to it (8 bits).
    assert loss.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-3)


def test_no_tensor_of_all_logits_is_ever_made():
    n_tokens, vocab, chunk = 512, 1000, 32
    h = torch.randn(n_tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        cross_entropy(h, weight, torch.randint(0, vocab, (n_tokens,)), chunk=chunk).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * chunk * vocab * 4 < n_tokens * vocab * 4
