"""Which experts see a token, and how much each counts.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; group scores: github deepseek-ai/DeepSeek-V3, inference/model.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import MoEConfig


@dataclass
class Routing:
    """A router's answer for N tokens.

    Attributes:
        chosen: (N, S) experts, in no order.
        weights: (N, S), what multiplies each chosen expert's output.
        scores: (N, E), affinities before any bias.
    """

    chosen: Tensor
    weights: Tensor
    scores: Tensor


class Router(nn.Module):
    """Sigmoid affinities; a bias that only choosing sees keeps the experts equally busy.

    Buffers:
        balance_bias: (E,), in checkpoints; moved by the trainer once an update, not by the optimizer.
        load: (E,), tokens sent to each expert since the last update.
        balance_value: scalar, the balance loss since the last update.
    """

    def __init__(self, config: MoEConfig, *, d_model: int) -> None:
        super().__init__()
        self.config = config.router
        self.top_k = config.top_k
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(config.n_experts, d_model))
        self.register_buffer("balance_bias", torch.zeros(config.n_experts, dtype=wide))
        self.register_buffer("load", torch.zeros(config.n_experts, dtype=wide), persistent=False)
        self.register_buffer("balance_value", torch.zeros((), dtype=wide), persistent=False)

    balance_bias: Tensor
    load: Tensor
    balance_value: Tensor

    def forward(self, x: Tensor) -> Routing:
        """Choose experts for (N, D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(x.dtype).to(wide)  # rounded first, so that a plan that gathers bf16 weights agrees
        scores = F.linear(x.to(wide), weight).sigmoid()
        chosen = self._choose(scores.detach() + self.balance_bias)
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.config.scale
        return Routing(chosen, weights, scores)

    def _choose(self, biased: Tensor) -> Tensor:
        """The best S experts among the best groups; a group scores the sum of its best two."""
        groups = self.config.n_groups
        if self.config.top_groups < groups:
            grouped = biased.view(-1, groups, biased.shape[-1] // groups)
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.config.top_groups, dim=-1, sorted=False).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
            biased = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        return biased.topk(self.top_k, dim=-1, sorted=False).indices

    def balance_loss(self, scores: Tensor, *, rows: int) -> Tensor:
        """Sequence-wise balance loss, equations 17 to 20, summed over ``rows`` rows; experts count unbiased, ungrouped.

        A row whose tokens spread evenly costs ``config.balance_loss``.
        """
        n_experts = scores.shape[-1]
        shares = (scores / scores.sum(dim=-1, keepdim=True)).view(rows, -1, n_experts)
        chosen = scores.detach().topk(self.top_k, dim=-1, sorted=False).indices.view(rows, -1)
        ones = torch.ones_like(chosen, dtype=scores.dtype)
        counts = scores.new_zeros(rows, n_experts).scatter_add_(1, chosen, ones)  # (B, E)
        fractions = counts * (n_experts / chosen.shape[1])
        return self.config.balance_loss * (fractions * shares.mean(dim=1)).sum()

    @torch.no_grad()
    def tally(self, stats: "Tally") -> None:
        """Add one forward to the counts; called outside what activation checkpointing runs again."""
        self.load += stats.load
        self.balance_value += stats.balance


@dataclass
class Tally:
    """What one forward of a router counted: (E,) tokens an expert, and the balance loss, both without gradient."""

    load: Tensor
    balance: Tensor


class AttachLoss(torch.autograd.Function):
    """Hand ``x`` through and let ``loss`` join the total: works in any pipeline stage, before the total exists."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        """Return ``x``."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The loss is a summand of the total: its gradient is one."""
        return grads[0], grads[0].new_ones(())
