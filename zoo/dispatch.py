"""Tokens to experts and back, on one device; expert parallelism puts another dispatcher in its place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Sent:
    """Rows grouped by expert.

    Attributes:
        rows: (M, D), the tokens of the first expert that is here, then those of the next, and so on; none is dropped.
            On one device all E experts are here and M is N·S.
        counts: int64, rows of each expert that is here.
        slots: (N·S,), which of the N·S choices, in token order, each row is that was sent from here.
        weights: (N, S), what multiplies each chosen expert's result.
        load: (E,) int64, how many of the choices that were made here fell on each expert.
    """

    rows: Tensor
    counts: Tensor
    slots: Tensor
    weights: Tensor
    load: Tensor


class Dispatcher(nn.Module):
    """Sorts the choices of all tokens by expert.

    Example: two tokens choose experts (1, 0) and (1, 2). In token order the choices are 1 0 1 2, sorted by expert
    0 1 1 2: slots are 1 0 2 3, rows are tokens 0 0 1 1 and counts 1 2 1.

    Attributes:
        balanced: whether experts take turns, whatever was chosen: sizes then depend on nothing in a tensor, which is
            what a dry run needs.
        travels: whether tokens go to other ranks.
    """

    travels = False

    def __init__(self) -> None:
        super().__init__()
        self.balanced = False

    def dispatch(self, x: Tensor, chosen: Tensor, *, n_experts: int, weights: Tensor, early: bool = False) -> Sent:
        """Copy each of (N, D) tokens once for each of its chosen experts, and send the copies to them.

        Args:
            x: (N, D).
            chosen: (N, S).
            n_experts: of which they were chosen.
            weights: (N, S), of the chosen ones.
            early: whether weights multiply what goes into an expert, not what comes out.

        Returns:
            What ``arrived`` waits for.
        """
        slots, load = self._sorted(chosen, n_experts)
        return departing(x, slots, load=load, weights=weights, early=early)

    def arrived(self, sent: Sent) -> Sent:
        """Wait for all rows of the experts that are here; on one device they are here already."""
        return sent

    def combine(self, y: Tensor, sent: Sent) -> Tensor:
        """Sum each token's results, of (M, D) in the order of ``sent.rows``, as ``sent.weights`` say, to (N, D)."""
        return _Combine.apply(y, sent.weights, sent.slots)

    def _sorted(self, chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
        """Slots and load."""
        flat = (turns(chosen, n_experts) if self.balanced else chosen).flatten()
        load = torch.zeros(n_experts, dtype=torch.int64, device=flat.device)
        return flat.argsort(stable=True), load.scatter_add_(0, flat, torch.ones_like(flat))


def turns(chosen: Tensor, n_experts: int) -> Tensor:
    """Other choices in the place of (N, S): experts take turns.

    Example: two choices each of three tokens among four experts are 0 1, 2 3, 0 1.
    """
    return torch.arange(chosen.numel(), device=chosen.device).remainder(n_experts).view_as(chosen)


def departing(x: Tensor, slots: Tensor, *, load: Tensor, weights: Tensor, early: bool) -> Sent:
    """Rows as they are sent from here."""
    rows = x.index_select(0, slots // weights.shape[1])
    if early:
        rows = rows * weights.flatten()[slots].to(x.dtype)[:, None]
        weights = torch.ones_like(weights)
    return Sent(rows, load, slots, weights, load)


class _Combine(torch.autograd.Function):
    """Results back in token order, then one small product a token; on a CPU 1.7 times as fast as adding by index."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        back = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
        results = y.index_select(0, back).view(*weights.shape, y.shape[-1])  # (N, S, D)
        ctx.save_for_backward(results, weights, slots)
        return torch.bmm(weights.to(y.dtype)[:, None], results)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        results, weights, slots = ctx.saved_tensors
        grad = grads[0]
        d_weights = torch.bmm(results, grad[:, :, None])[:, :, 0].to(weights.dtype)
        scales = weights.flatten()[slots].to(grad.dtype)[:, None]
        return grad.index_select(0, slots // weights.shape[1]).mul_(scales), d_weights, None
