"""Attention written out: any slot, any mask, any dtype; a part of the queries at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.mask import Mask
from zoo.section import Section

SCORES = 2**20
"""Scores held at once, for all rows and heads of a part of the queries: 4 MiB in fp32, near a core's cache.

Forward and backward of 4,096 tokens, 16 heads of 64 in fp32, one core: 2.8 s, against 3.1 with 2**22, 4.0 with 2**18
and 2.3 by sdpa.
"""


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Section,
    *,
    scale: float,
    softcap: float | None = None,
    factors: Tensor | None = None,
    sinks: Tensor | None = None,
    tells: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend, in at least fp32: (B, T, H, K), (B, T, G, K), (B, T, G, U) to (B, T, H, U).

    Scores are scaled, capped, multiplied by the query's factor, masked, in this order.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: who sees whom.
        scale: of the scores.
        softcap: scores become softcap · tanh(scores / softcap).
        factors: (B, T), of the capped scores of each query.
        sinks: (H,), one more logit a head, in the denominator only.
        tells: whether the largest masked score of each head is wanted.

    Returns:
        The result; and (H,), without a gradient, or None.
    """
    if not tells:
        return _Attend.apply(q, k, v, sinks, factors, mask, scale, softcap, False), None
    y, top = _Attend.apply(q, k, v, sinks, factors, mask, scale, softcap, True)
    return y, top


class _Attend(torch.autograd.Function):
    """Keeps the inputs and one number a query and head, the logarithm of its denominator; makes scores again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        factors: Tensor | None,
        mask: Mask | Section,
        scale: float,
        softcap: float | None,
        tells: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        heads = _Heads(q, k, v, sinks, factors, mask, scale, softcap)
        y = heads.q.new_empty(*heads.q.shape[:-1], v.shape[-1])  # (B, G, H/G, T, U)
        denominator = heads.q.new_empty(*heads.q.shape[:-1], 1)  # its logarithm
        largest = heads.q.new_full(heads.q.shape[1:3], -torch.inf) if tells else None  # (G, H/G)
        for queries, keys in heads.parts():
            scores, _ = heads.scores(queries, keys)
            top = scores.amax(-1, keepdim=True)
            if largest is not None:
                largest = torch.maximum(largest, top.amax(dim=(0, 3, 4)))
            top = top if heads.sinks is None else torch.maximum(top, heads.sinks)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            if heads.sinks is not None:
                total += (heads.sinks - top).exp()
            here = slice(queries.start, queries.stop)
            y[..., here, :] = _by_group(weights.div_(total), heads.v[..., keys.start : keys.stop, :])
            denominator[..., here, :] = total.log_().add_(top)
        ctx.save_for_backward(q, k, v, sinks, factors, denominator)
        ctx.settings = mask, scale, softcap
        result = y.flatten(1, 2).transpose(1, 2).to(q.dtype)
        if largest is None:
            return result
        largest = largest.flatten()
        ctx.mark_non_differentiable(largest)
        return result, largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, factors, denominator = ctx.saved_tensors
        heads = _Heads(q, k, v, sinks, factors, *ctx.settings)
        _, scale, softcap = ctx.settings
        d_y = _grouped(grads[0], heads.k.shape[1], heads.q.dtype)
        d_q, d_k, d_v = torch.empty_like(heads.q), torch.zeros_like(heads.k), torch.zeros_like(heads.v)
        d_sinks = None if heads.sinks is None else torch.zeros_like(heads.sinks)
        for queries, keys in heads.parts():
            here, there = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
            scores, capped = heads.scores(queries, keys)
            weights = scores.sub_(denominator[..., here, :]).exp_()
            pull = d_y[..., here, :]
            d_v[..., there, :] += _over_queries(weights, pull)
            d_weights = _by_group(pull, heads.v[..., there, :].mT)
            mean = torch.linalg.vecdot(weights, d_weights)[..., None]
            if d_sinks is not None:
                missing = (heads.sinks - denominator[..., here, :]).exp() * mean
                d_sinks -= missing.sum(dim=(0, 3), keepdim=True)
            d_scores = d_weights.sub_(mean).mul_(weights)
            if heads.factors is not None:
                d_scores *= heads.factors[..., here, :]
            if capped is not None:
                d_scores *= 1 - (capped / softcap).square_()
            d_scores *= scale
            d_q[..., here, :] = _by_group(d_scores, heads.k[..., there, :])
            d_k[..., there, :] += _over_queries(d_scores, heads.q[..., here, :])
        d_q = d_q.flatten(1, 2).transpose(1, 2).to(q.dtype)
        d_k, d_v = d_k.transpose(1, 2).to(k.dtype), d_v.transpose(1, 2).to(v.dtype)
        d_sinks = None if d_sinks is None else d_sinks.flatten().to(sinks.dtype)
        return d_q, d_k, d_v, d_sinks, None, None, None, None, None


class _Heads:
    """Inputs with the heads of a group side by side, in at least fp32; makes the scores of some queries."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        factors: Tensor | None,
        mask: Mask | Section,
        scale: float,
        softcap: float | None,
    ) -> None:
        n_groups, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
        self.mask, self.scale, self.softcap = mask, scale, softcap
        self.q = _grouped(q, n_groups, wide)  # (B, G, H/G, T, K)
        self.k = k.transpose(1, 2).to(wide).contiguous()  # (B, G, T, K)
        self.v = v.transpose(1, 2).to(wide).contiguous()  # (B, G, T, U)
        self.sinks = None if sinks is None else sinks.to(wide).view(1, n_groups, -1, 1, 1)
        self.factors = None if factors is None else factors.to(wide)[:, None, None, :, None]

    def parts(self) -> Iterator[tuple[range, range]]:
        """Consecutive queries, so many that their scores are not too many, with the keys within their reach."""
        B, G, shared, T, _ = self.q.shape
        step = max(1, min(T, SCORES // (B * G * shared * self.k.shape[2])))
        for first in range(0, T, step):
            queries = range(first, min(first + step, T))
            yield queries, self.mask.reach(queries)

    def scores(self, queries: range, keys: range) -> tuple[Tensor, Tensor | None]:
        """What the softmax sees, (B, G, H/G, queries, keys), and with a softcap what was capped, before the mask."""
        scores = _by_group(self.q[..., queries.start : queries.stop, :], self.k[..., keys.start : keys.stop, :].mT)
        scores *= self.scale
        capped = None
        if self.softcap is not None:
            scores = capped = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.factors is not None:
            scores = scores * self.factors[..., queries.start : queries.stop, :]
        hidden = ~self.mask.part(queries=queries, keys=keys)[:, :, None]
        return scores.masked_fill(hidden, -torch.inf), capped


def _grouped(x: Tensor, n_groups: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, K) as (B, G, H/G, T, K)."""
    return x.transpose(1, 2).unflatten(1, (n_groups, -1)).to(dtype).contiguous()


def _by_group(left: Tensor, right: Tensor) -> Tensor:
    """(B, G, H/G, M, N) times (B, G, N, P) to (B, G, H/G, M, P): one product for the heads of a group."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def _over_queries(left: Tensor, right: Tensor) -> Tensor:
    """(B, G, H/G, M, N) and (B, G, H/G, M, P) to (B, G, N, P), summed over M and the heads of a group."""
    return left.flatten(2, 3).mT @ right.flatten(2, 3)
