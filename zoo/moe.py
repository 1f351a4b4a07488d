"""Mixture of experts: routed experts beside a shared one. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

Weights on what goes in: transformers, models/llama4/modeling_llama4.py; a gated shared expert: models/qwen3_next.
"""

import torch
from torch import Tensor, nn

from zoo.config_ff import MLPConfig, MoEConfig
from zoo.context import Context
from zoo.dispatch import Dispatcher
from zoo.experts import Experts
from zoo.linear import Linear
from zoo.mlp import MLP
from zoo.router import AttachLoss, Router, Tally


class MoE(nn.Module):
    """S of E narrow experts for each token, chosen by a router, and a shared expert, if there is one, for all.

    Attributes:
        balance_share: of the router's losses that this rank adds; below 1 where several compute them of the same
            tokens.
    """

    def __init__(self, config: MoEConfig, *, d_model: int) -> None:
        super().__init__()
        self.scale_input = config.scale_input
        self.balance_share = 1.0
        self.router = Router(config, d_model=d_model)
        self.dispatcher = Dispatcher()
        self.experts = Experts(config, d_model=d_model)
        shared = MLPConfig(d_ff=config.d_shared, activation=config.activation) if config.d_shared else None
        self.shared = None if shared is None else MLP(shared, d_model=d_model)
        self.shared_gate = Linear(d_model, 1) if config.shared_gate else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tally]:
        """Map (B, T, D) to (B, T, D) and count; under training the router's losses ride on the result's gradient."""
        tokens = x.flatten(0, 1)  # (N, D)
        routing = self.router(tokens)
        sent = self.dispatcher.dispatch(
            tokens,
            routing.chosen,
            n_experts=routing.scores.shape[-1],
            weights=routing.weights,
            early=self.scale_input,
        )
        shared = self._shared(x)  # while tokens travel, where experts are on other ranks
        sent = self.dispatcher.arrived(sent)
        y = self.dispatcher.combine(self.experts(sent.rows, sent.counts), sent).view_as(x)
        if shared is not None:
            y = y + shared

        balance = z = torch.zeros_like(self.router.balance_value)
        if context.rows is not None and self.router.config.adds_loss:
            balance, z = (loss / context.rows for loss in self.router.losses(routing, sent.load, rows=x.shape[0]))
            y = AttachLoss.apply(y, (balance + z) * self.balance_share)
        return y, Tally(sent.load, balance.detach(), z.detach())

    def _shared(self, x: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        shared: Tensor = self.shared(x)
        return shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared
