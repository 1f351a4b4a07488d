"""Mixture of experts: routed experts beside a shared one. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2."""

import torch
from torch import Tensor, nn

from zoo.config import MoEConfig
from zoo.context import Context
from zoo.dispatch import Dispatcher
from zoo.experts import Experts
from zoo.mlp import MLP
from zoo.router import AttachLoss, Router, Tally


class MoE(nn.Module):
    """S of E narrow experts for each token, chosen by a router, and a shared expert, if there is one, for all."""

    def __init__(self, config: MoEConfig, *, d_model: int) -> None:
        super().__init__()
        self.router = Router(config, d_model=d_model)
        self.dispatcher = Dispatcher()
        self.experts = Experts(n_experts=config.n_experts, d_model=d_model, d_expert=config.d_expert)
        self.shared = MLP(d_model=d_model, d_ff=config.d_shared) if config.d_shared else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tally]:
        """Map (B, T, D) to (B, T, D) and count; under training the balance loss rides on the result's gradient."""
        tokens = x.flatten(0, 1)  # (N, D)
        routing = self.router(tokens)
        sent = self.dispatcher.dispatch(tokens, routing.chosen, n_experts=routing.scores.shape[-1])
        routed = self.dispatcher.combine(self.experts(sent.rows, sent.counts), sent, routing.weights)
        y = routed.view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)

        balance = torch.zeros_like(self.router.balance_value)
        if context.rows is not None and self.router.config.balance_loss > 0:
            balance = self.router.balance_loss(routing.scores, rows=x.shape[0]) / context.rows
            y = AttachLoss.apply(y, balance)
        return y, Tally(sent.counts, balance.detach())
