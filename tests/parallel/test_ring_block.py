"""Attention of a block that gives its denominators, against its definition; CUDA's operators by their shapes alone."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from parallel.ring_block import attend, attend_backward

B, H, G, M, N, K, U = 2, 4, 2, 5, 7, 8, 6


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs():
    return drawn(B, H, M, K, seed=1), drawn(B, G, N, K, seed=2), drawn(B, G, N, U, seed=3)


def test_a_block_gives_its_result_and_its_denominators():
    q, k, v = inputs()
    seen = drawn(B, 1, M, N, seed=4) > 0
    seen[0, 0, 2], seen[1, 0, 0] = False, True
    scores = 0.3 * q @ k.repeat_interleave(2, dim=1).mT
    hidden = scores.masked_fill(~seen, -torch.inf)
    y, denominator = attend(q, k, v, causal=False, mask=seen, scale=0.3)
    want = hidden.softmax(-1) @ v.repeat_interleave(2, dim=1)
    nothing = ~seen.any(-1).expand(B, H, M)
    assert nothing.sum() == H and (denominator[nothing] < -1e29).all() and y[nothing].isfinite().all()
    torch.testing.assert_close(y[~nothing], want[~nothing], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(denominator[~nothing], hidden.logsumexp(-1)[~nothing], rtol=1e-12, atol=1e-13)


def test_two_blocks_have_the_gradients_of_both_together():
    q, k, v = (x.requires_grad_() for x in inputs())
    seen, grad = drawn(B, 1, M, N, seed=4) > 0.3, drawn(B, H, M, U, seed=5)
    seen[..., 0] = True
    scores = (0.3 * q @ k.repeat_interleave(2, dim=1).mT).masked_fill(~seen, -torch.inf)
    y = scores.softmax(-1) @ v.repeat_interleave(2, dim=1)
    want = torch.autograd.grad(y, (q, k, v), grad)
    q, k, v, y, denominator = (x.detach() for x in (q, k, v, y, scores.logsumexp(-1)))
    parts = []
    for keys in (slice(0, 3), slice(3, N)):
        own = k[:, :, keys], v[:, :, keys], y, denominator
        parts.append(attend_backward(grad, q, *own, causal=False, mask=seen[..., keys], scale=0.3))
    got = [parts[0][0] + parts[1][0], *(torch.cat(both, dim=2) for both in list(zip(*parts, strict=True))[1:])]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


class Names(TorchFunctionMode):
    """Which of torch's operators ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_for_gpus_take_these_arguments(dtype, masked):
    q, k, v = (x.to("meta", dtype) for x in inputs())
    mask = torch.ones(B, 1, M, N, dtype=torch.bool, device="meta") if masked else None
    with Names() as names:
        y, denominator = attend(q, k, v, causal=not masked, mask=mask, scale=0.3)
        assert y.shape == (B, H, M, U) and denominator.shape == (B, H, M)
        assert y.dtype is denominator.dtype is torch.float32
        results = y.to(dtype), denominator
        pulls = attend_backward(y.to(dtype), q, k, v, *results, causal=not masked, mask=mask, scale=0.3)
    assert [pull.shape for pull in pulls] == [q.shape, k.shape, v.shape]
    flash = dtype is torch.bfloat16 and not masked
    ran = [name for name in names.seen if "_scaled_dot_product" in name]
    kind = "flash" if flash else "efficient"
    assert ran == [f"aten._scaled_dot_product_{kind}_attention", f"aten._scaled_dot_product_{kind}_attention_backward"]
