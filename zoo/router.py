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

from zoo.config_ff import GroupScore, MoEConfig, Score


@dataclass
class Routing:
    """A router's answer for N tokens.

    Attributes:
        chosen: (N, S) experts, in no order.
        weights: (N, S), what multiplies each chosen expert's output, or its input.
        scores: (N, E), affinities before any balancing bias.
    """

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
        balance_value: scalar, the balance loss since the last update.

    Attributes:
        row_parts: ranks that have a part of each row's tokens, and add its part of the balance loss.
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

    balance_bias: Tensor | None
    load: Tensor
    balance_value: Tensor

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
        return Routing(chosen, weights * self.config.scale, scores)

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

    def balance_loss(self, scores: Tensor, *, rows: int) -> Tensor:
        """Sequence-wise balance loss, equations 17 to 20, summed over ``rows`` rows; experts count unbiased, ungrouped.

        Made for sigmoids; the softmax's scores are shares already. A row whose tokens spread evenly costs
        ``config.balance_loss``. Where ranks share rows, each gives its summand: fractions are those of whole rows,
        shares those of its tokens.
        """
        n_experts = scores.shape[-1]
        shares = (scores / scores.sum(dim=-1, keepdim=True)).view(rows, -1, n_experts)
        chosen = scores.detach().topk(self.top_k, dim=-1, sorted=False).indices.view(rows, -1)
        ones = torch.ones_like(chosen, dtype=scores.dtype)
        counts = scores.new_zeros(rows, n_experts).scatter_add_(1, chosen, ones)  # (B, E)
        fractions = self._over_rows(counts) * (n_experts / (chosen.shape[1] * self.row_parts))
        return self.config.balance_loss / self.row_parts * (fractions * shares.mean(dim=1)).sum()

    def _over_rows(self, counts: Tensor) -> Tensor:
        """(B, E) choices of whole rows, from those of the tokens that are here; without a gradient."""
        return counts

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
