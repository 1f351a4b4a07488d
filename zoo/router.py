"""Which experts see a token, and how much each counts.

Sources: DeepSeek-V3, arXiv 2412.19437, section 2.1.2, and for its groups github deepseek-ai/DeepSeek-V3,
inference/model.py; the routers of transformers 5.23 in models/<family>/modeling_<family>.py: mixtral, qwen3_moe,
qwen3_next, deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, llama4; Grok 2.5: sgl-project/sglang, layers/moe/router.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config_ff import DeviceLossConfig, GroupScore, MoEConfig, Score


@dataclass
class Routing:
    """A router's answer for N tokens.

    Attributes:
        logits: (N, E).
        chosen: (N, S) experts, in no order.
        weights: (N, S), what multiplies each chosen expert's output, or its input.
        scores: (N, E), affinities before any balancing bias.
    """

    logits: Tensor
    chosen: Tensor
    weights: Tensor
    scores: Tensor


class Router(nn.Module):
    """Scores every expert, chooses some, weighs them; a bias that only choosing sees may keep experts equally busy.

    Logits are computed in fp32 at least, as DeepSeek, Kimi, GLM and Grok do; the references of Mixtral, Qwen3, Llama 4
    and gpt-oss multiply in the model's dtype, so that under bf16 a close choice may fall otherwise here.

    Parameters:
        weight: (E, D); bias: (E,) of the logits, None without ``config.bias``.

    Buffers:
        balance_bias: (E,), in checkpoints; moved by the trainer once an update, not by the optimizer; None without
            ``config.balance_rate``.
        load: (E,), tokens sent to each expert since the last update.
        balance_value: scalar, the balance losses since the last update; z_value: the z-loss.
        batch_load: (E,), tokens of the whole global batch sent to each expert; set by the trainer ahead of an update
            where ``config.counts_ahead``.

    Attributes:
        row_parts: ranks that have a part of each row's tokens, and add its part of each loss.
    """

    def __init__(self, config: MoEConfig, *, d_model: int) -> None:
        super().__init__()
        self.config = config.router
        self.top_k = config.top_k
        self.row_parts = 1
        n_experts, balanced = config.n_experts, config.router.balance_rate is not None
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(n_experts)) if config.router.bias else None
        self.register_buffer("balance_bias", torch.zeros(n_experts, dtype=wide) if balanced else None)
        self.register_buffer("load", torch.zeros(n_experts, dtype=wide), persistent=False)
        self.register_buffer("balance_value", torch.zeros((), dtype=wide), persistent=False)
        self.register_buffer("z_value", torch.zeros((), dtype=wide), persistent=False)
        self.register_buffer("batch_load", torch.zeros(n_experts, dtype=wide), persistent=False)

    balance_bias: Tensor | None
    load: Tensor
    balance_value: Tensor
    z_value: Tensor
    batch_load: Tensor

    def forward(self, x: Tensor) -> Routing:
        """Choose experts for (N, D)."""
        logits, score = self._logits(x), self.config.score
        scores = logits.sigmoid() if score is Score.sigmoid else logits.softmax(dim=-1)
        chosen = self._choose(logits.detach(), scores.detach())
        if score is Score.softmax_chosen:
            weights = logits.gather(1, chosen).softmax(dim=-1)
        else:
            weights = scores.gather(1, chosen)
        if self.config.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # of V3 and GLM; lost where a sum is near 1
        return Routing(logits, chosen, weights * self.config.scale, scores)

    def _logits(self, x: Tensor) -> Tensor:
        """(N, E); weight and bias are rounded first, so that a plan that gathers them in bf16 agrees."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(x.dtype).to(wide)
        logits = F.linear(x.to(wide), self.weight.to(x.dtype).to(wide), bias)
        cap = self.config.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _choose(self, logits: Tensor, scores: Tensor) -> Tensor:
        """The best S experts among the best groups; without bias or groups by logits, which never saturate to ties."""
        groups, closing = self.config.n_groups, self.config.top_groups < self.config.n_groups
        if self.balance_bias is not None:
            values = scores + self.balance_bias
        else:
            values = scores if closing else logits
        if closing:
            grouped = values.view(-1, groups, values.shape[-1] // groups)
            worth = self._worth(grouped)
            best = worth.topk(self.config.top_groups, dim=-1, sorted=False).indices
            closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
            values = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        return values.topk(self.top_k, dim=-1, sorted=False).indices

    def _worth(self, grouped: Tensor) -> Tensor:
        """What each group is worth: (N, groups, experts of a group) to (N, groups)."""
        if self.config.group_score is GroupScore.best:
            return grouped.amax(dim=-1)
        return grouped.topk(2, dim=-1).values.sum(dim=-1)

    def losses(self, routing: Routing, load: Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
        """The sum of all balance losses, and the z-loss, of tokens of ``rows`` rows; both summed over these rows.

        Where ranks share rows, each gives its summand: fractions are those of whole rows, shares those of its tokens.

        Args:
            routing: of these tokens.
            load: (E,), how many of their choices fell on each expert.
            rows: that they are from.
        """
        c, scores = self.config, routing.scores
        shares = scores / scores.sum(dim=-1, keepdim=True)  # made for sigmoids: a softmax's are shares already
        shares = shares.view(rows, -1, scores.shape[-1]).mean(dim=1)  # (B, E)
        balance, z = scores.new_zeros(()), scores.new_zeros(())
        if c.balance_loss > 0:
            best = scores.detach().topk(self.top_k, dim=-1, sorted=False).indices  # unbiased, ungrouped
            counts = self._over_rows(_counts(best, rows=rows, n=scores.shape[-1], dtype=scores.dtype))
            balance = balance + c.balance_loss * agreement(counts, shares)
        if c.switch_loss.weight > 0:
            counts = self.batch_load if c.counts_ahead else self._over_rows(load.to(scores.dtype))
            balance = balance + c.switch_loss.weight * rows * agreement(counts, shares.mean(dim=0))
        if c.device_loss.on:
            balance = balance + self._device_loss(c.device_loss, routing.chosen, shares)
        if c.z_loss > 0:
            squares = routing.logits.logsumexp(dim=-1).square()
            z = c.z_loss * squares.view(rows, -1).mean(dim=1).sum()
        return balance / self.row_parts, z / self.row_parts

    def _device_loss(self, weights: DeviceLossConfig, chosen: Tensor, shares: Tensor) -> Tensor:
        """DeepSeek-V2's three losses, equations 23 to 31, summed over rows; its devices are groups of experts.

        Args:
            weights: of each.
            chosen: (B·T, S).
            shares: (B, E), means over the tokens of each row that are here.
        """
        rows, n_experts = shares.shape
        groups, of = self.config.n_groups, chosen // (n_experts // self.config.n_groups)
        reached = shares.new_zeros(len(chosen), groups).scatter_(1, of, 1.0).view(rows, -1, groups).sum(dim=1)
        counts = _counts(chosen, rows=rows, n=n_experts, dtype=shares.dtype)
        counts, reached = self._over_rows(torch.cat([counts, reached], dim=1)).split([n_experts, groups], dim=1)
        devices = shares.view(rows, groups, -1).sum(dim=-1)
        tokens = counts.sum(dim=1, keepdim=True) / self.top_k
        expert = agreement(counts, shares)
        device = agreement(counts.view(rows, groups, -1).sum(dim=-1), devices)
        sent = (reached * (groups / self.config.top_groups) / tokens * devices).sum()
        return weights.expert * expert + weights.device * device + weights.communication * sent

    def _over_rows(self, counts: Tensor) -> Tensor:
        """Choices of whole rows, from those of their tokens that are here; may change ``counts``; no gradient."""
        return counts

    @torch.no_grad()
    def tally(self, stats: "Tally") -> None:
        """Add one forward to the counts; called outside what activation checkpointing runs again."""
        self.load += stats.load
        self.balance_value += stats.balance
        self.z_value += stats.z


@dataclass
class Tally:
    """What one forward of a router counted: (E,) tokens an expert, its balance loss and z-loss, without gradient."""

    load: Tensor
    balance: Tensor
    z: Tensor


def agreement(counts: Tensor, shares: Tensor) -> Tensor:
    """The balance loss of weight 1, summed over rows: choices as multiples of their mean, times shares of scores.

    Choices have no gradient. Even shares, or even choices, make it 1 a row; no choices at all 0.

    Example: choices 3 1 are 1.5 and 0.5 times their mean; with shares 0.6 0.4 that is 0.9 + 0.2 = 1.1.

    Args:
        counts: (…, n), choices that fell on each of n experts or groups of them.
        shares: (…, n), means over tokens; their sum is 1.
    """
    return (counts * (counts.shape[-1] / counts.sum(dim=-1, keepdim=True).clamp(min=1)) * shares).sum()


def _counts(chosen: Tensor, *, rows: int, n: int, dtype: torch.dtype) -> Tensor:
    """How often each row has chosen each of n experts: (B·T, S) to (B, n)."""
    flat = chosen.reshape(rows, -1)
    return torch.zeros(rows, n, dtype=dtype, device=chosen.device).scatter_add_(
        1, flat, torch.ones_like(flat, dtype=dtype)
    )


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
