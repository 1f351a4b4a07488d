"""Tokens to experts and back, on one device; expert parallelism puts another dispatcher in its place."""

from dataclasses import dataclass

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

    def dispatch(self, x: Tensor, chosen: Tensor, *, n_experts: int) -> Sent:
        """Copy each of (N, D) tokens once for each of its (N, S) chosen experts."""
        flat = chosen.flatten()
        slots = flat.argsort(stable=True)
        counts = torch.zeros(n_experts, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))
        return Sent(x.index_select(0, slots // chosen.shape[1]), counts, slots)

    def combine(self, y: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        """Sum each token's (N·S, D) results, weighted by (N, S), to (N, D)."""
        scaled = y * weights.flatten()[sent.slots].to(y.dtype)[:, None]
        return torch.zeros_like(y[: weights.shape[0]]).index_add(0, sent.slots // weights.shape[1], scaled)
