"""Cross-entropy of the next token without logits of all tokens at once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm import Lane
from zoo.linear import widened


@dataclass
class ZLoss:
    """A penalty on logits that drift: weight · (log Z)², Z the sum of their exponentials.

    Sources: PaLM, arXiv 2204.02311, section 5; at 1e-5 OLMo 2, arXiv 2501.00656, and Chameleon, arXiv 2405.09818.

    Attributes:
        weight: of the mean over targets.
        total: scalar; weight · (log Z)² of every target so far is added to it.
    """

    weight: float
    total: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Which rows of the vocabulary this rank has: those from ``first`` on that its weight holds.

    Attributes:
        lane: the ranks that share it.
        first: token of the first row.
    """

    lane: Lane
    first: int


def cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    softcap: float | None = None,
    vocabulary: Vocabulary | None = None,
    z_loss: ZLoss | None = None,
) -> Tensor:
    """Summed cross-entropy in nats, with gradients made chunk by chunk while each chunk's logits exist.

    Where ranks share the vocabulary, two all-reduces over tp a chunk: of a number a token, then of two.

    Args:
        h: (N, D), states.
        weight: (V, D), of the head, or this rank's rows of it.
        targets: (N,), negative where nothing is to be predicted.
        chunk: how many tokens have logits at one time.
        softcap: logits become softcap · tanh(logits / softcap) first.
        vocabulary: the rows that ``weight`` holds; None: all. The gradient of ``h`` is that of these rows' logits.
        z_loss: a penalty whose sum is in the gradient, but not in the result, beside which it is counted; not where
            nothing is trained. None: none.

    Returns:
        A scalar in at least fp32, on all ranks that share the vocabulary the same.
    """
    return _CrossEntropy.apply(h, weight, targets, chunk, softcap, vocabulary, z_loss, torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    """The gradient of the sum is made in the forward and scaled in the backward: logits never outlive their chunk.

    All chunks share one buffer: on a CPU, new ones each time cost more in page faults than the softmax does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        softcap: float | None,
        vocabulary: Vocabulary | None,
        z_loss: ZLoss | None,
        training: bool,
    ) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        matrix = widened(weight, h.dtype)
        buffer = matrix.new_empty(min(chunk, h.shape[0]), weight.shape[0])
        wide_buffer = buffer if matrix.dtype is wide else torch.empty_like(buffer, dtype=wide)
        result = torch.zeros((), dtype=wide, device=h.device)
        if training:
            d_h = torch.empty_like(h, dtype=matrix.dtype)
            d_weight = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, wide), device=h.device)
        for start in range(0, h.shape[0], chunk):
            part, target = h[start : start + chunk].to(matrix.dtype), targets[start : start + chunk]
            logits, logs = buffer[: len(part)], wide_buffer[: len(part)]
            counted = (target >= 0)[:, None]
            index, here = target.clamp(min=0)[:, None], torch.ones_like(counted)
            torch.mm(part, matrix.t(), out=logits)
            logs.copy_(logits)
            slope = None if softcap is None else _cap(logs, softcap)
            if vocabulary is None:
                log_p, log_z = _softmax(logs, index, probabilities=training)
            else:
                index, here = _own(index, rows=logs.shape[1], vocabulary=vocabulary)
                log_p, log_z = _shared_softmax(logs, index, here, lane=vocabulary.lane)
            result -= log_p.where(counted, 0.0).sum()
            if not training:
                continue
            if z_loss is not None:  # d (log Z)² = 2 log Z · softmax
                z_loss.total += z_loss.weight * log_z.where(counted, 0.0).square().sum()
                logs.mul_(1 + 2 * z_loss.weight * log_z)
            logs.scatter_add_(1, index, -here.to(logs.dtype))  # softmax, less one at the target
            logits.copy_(logs if slope is None else logs.mul_(slope))
            # Tokens that do not count are left out of the narrow factors, which is cheaper than out of the wide one.
            torch.mm(logits, matrix, out=d_h[start : start + chunk]).mul_(counted)
            _add_product(d_weight, logits.t(), part * counted)
        if training:
            ctx.save_for_backward(d_h, d_weight)
            ctx.dtype, ctx.weight_dtype = h.dtype, weight.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_h, d_weight = ctx.saved_tensors
        d_h = (d_h * grads[0].to(d_h.dtype)).to(ctx.dtype)
        return d_h, (d_weight * grads[0]).to(ctx.weight_dtype), *[None] * 6


def _own(index: Tensor, *, rows: int, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Targets (n, 1) counted from this rank's first row, 0 where another has them, and whether they are here."""
    place = index - vocabulary.first
    here = (place >= 0) & (place < rows)
    return place.where(here, 0), here


def _softmax(logits: Tensor, index: Tensor, *, probabilities: bool) -> tuple[Tensor, Tensor]:
    """Softmax in place, or its logarithm unless ``probabilities``; its logarithm at the targets and log Z, (n, 1)."""
    before = logits.gather(1, index)
    torch.log_softmax(logits, dim=-1, out=logits)
    log_p = logits.gather(1, index)
    if probabilities:
        logits.exp_()
    return log_p, before - log_p


def _shared_softmax(logits: Tensor, index: Tensor, here: Tensor, *, lane: Lane) -> tuple[Tensor, Tensor]:
    """Softmax in place over the rows of all ranks; its logarithm at the targets and log Z (two all-reduces over tp)."""
    largest = logits.amax(dim=1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=lane.group)
    target = logits.sub_(largest).gather(1, index).where(here, 0.0)
    sums = torch.cat([logits.exp_().sum(dim=1, keepdim=True), target], dim=1)
    dist.all_reduce(sums, group=lane.group)
    logits.div_(sums[:, :1])
    log_sum = sums[:, :1].log()
    return sums[:, 1:] - log_sum, largest + log_sum


def _cap(logits: Tensor, cap: float) -> Tensor:
    """Cap logits in place; the slope of the cap, 1 − tanh²."""
    logits.div_(cap).tanh_()
    slope = logits.square().neg_().add_(1)
    logits.mul_(cap)
    return slope


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in one product where the dtypes allow it."""
    if total.dtype is a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
