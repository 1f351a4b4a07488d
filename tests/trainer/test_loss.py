import pytest
import torch
import torch.nn.functional as F
from distributed import run
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.comm import Lane
from trainer.loss import Vocabulary, ZLoss, cross_entropy


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


def penalised(h, weight, targets, *, softcap, z_weight):
    """Cross-entropy and z-loss written out, summed over the targets that count."""
    logits = h @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_z = logits.exp().sum(dim=1).log()
    counted = targets >= 0
    loss = (log_z - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0])[counted].sum()
    return loss, z_weight * log_z[counted].square().sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 23), st.integers(1, 30), st.integers(2, 17), st.booleans(), st.integers(0, 2**31))
def test_z_loss_is_counted_and_in_the_gradients(n_tokens, chunk, vocab, capped, seed):
    torch.manual_seed(seed)
    h = torch.randn(n_tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, vocab, (n_tokens,))
    softcap = 1.5 if capped else None

    z_loss = ZLoss(0.01, torch.zeros((), dtype=torch.float64))
    got = cross_entropy(h, weight, targets, chunk=chunk, softcap=softcap, z_loss=z_loss)
    loss, penalty = penalised(h, weight, targets, softcap=softcap, z_weight=0.01)
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_loss.total, penalty.detach(), rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got * 0.37, [h, weight])
    expected = torch.autograd.grad((loss + penalty) * 0.37, [h, weight])
    for each, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-11, atol=1e-12)

    before = z_loss.total.clone()
    with torch.no_grad():
        cross_entropy(h, weight, targets, chunk=chunk, softcap=softcap, z_loss=z_loss)
    assert torch.equal(z_loss.total, before)  # an evaluation has none


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


def drawn(vocab, large):
    """States, a weight and targets, some of which do not count; large logits overflow unless the largest is taken off.

    The vocabulary's last token, which may be alone on its rank, is a target.
    """
    generator = torch.Generator().manual_seed(vocab)
    h = torch.randn(13, 6, generator=generator, dtype=torch.float64) * (300 if large else 1)
    weight = torch.randn(vocab, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(-2, vocab, (13,), generator=generator)
    targets[5] = vocab - 1
    return h.requires_grad_(), weight.requires_grad_(), targets


def share(vocabs, softcap, large):
    """The loss by a rank's rows of each vocabulary, its gradients, and the loss where nothing is trained."""
    group = torch.distributed.group.WORLD
    lane, results = Lane(group, group.rank(), group.size()), []
    for vocab in vocabs:
        h, weight, targets = drawn(vocab, large)
        first = lane.rank * -(-vocab // lane.size)
        rows = weight.detach()[first : first + -(-vocab // lane.size)].clone().requires_grad_()
        z_loss = ZLoss(1e-3, torch.zeros((), dtype=torch.float64))
        shared = {"chunk": 5, "softcap": softcap, "vocabulary": Vocabulary(lane, first), "z_loss": z_loss}
        loss = cross_entropy(h, rows, targets, **shared)
        total = z_loss.total.item()
        gradients = torch.autograd.grad(loss * 0.37, [h, rows])
        with torch.no_grad():
            results.append((loss.item(), *gradients, cross_entropy(h, rows, targets, **shared).item(), total))
    return results


@pytest.mark.parametrize("softcap, large", [(None, False), (1.5, False), (None, True)])
def test_ranks_with_uneven_parts_of_the_vocabulary_have_the_whole_loss_and_parts_of_its_gradients(softcap, large):
    vocabs = [4, 7, 10, 61]
    for vocab, *ranks in zip(
        vocabs, *run(share, world_size=4, vocabs=vocabs, softcap=softcap, large=large), strict=True
    ):
        h, weight, targets = drawn(vocab, large)
        z_loss = ZLoss(1e-3, torch.zeros((), dtype=torch.float64))
        want = cross_entropy(h, weight, targets, chunk=13, softcap=softcap, z_loss=z_loss)
        d_h, d_weight = torch.autograd.grad(want * 0.37, [h, weight])
        for loss, _, _, evaluated, total in ranks:
            assert loss == evaluated == pytest.approx(want.item(), rel=1e-12)
            assert total == pytest.approx(z_loss.total.item(), rel=1e-12)
        torch.testing.assert_close(sum(each[1] for each in ranks), d_h, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.cat([each[2] for each in ranks]), d_weight, rtol=1e-11, atol=1e-11)
