"""From the last state to logits, or straight to a loss."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.linear import product_dtype, widened


class Loss(Protocol):
    """The summed loss of states under the head's weight."""

    def __call__(self, h: Tensor, weight: Tensor, targets: Tensor, /, *, softcap: float | None) -> Tensor:
        """Map (N, D) states, (V, D) weight and (N,) targets to a scalar; logits are capped first where asked."""


class Head(nn.Module):
    """The projection to the vocabulary. A tied head owns no weight: it is given the embedding's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.logit_scale
        self.softcap = config.logit_softcap
        self.weight = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def forward(self, h: Tensor, embedding: Tensor, targets: Tensor | None = None, loss: Loss | None = None) -> Tensor:
        """Logits (B, T, V) of states (B, T, D); with ``targets`` (B, T), the summed loss without those logits."""
        weight = embedding if self.weight is None else self.weight
        if self.scale != 1:
            h = h * self.scale  # of the states: there are fewer of them than of logits
        if targets is None or loss is None:
            logits = F.linear(h.to(product_dtype(h.dtype, h.device.type)), widened(weight, h.dtype)).to(h.dtype)
            return logits if self.softcap is None else capped(logits, self.softcap)
        return loss(h.flatten(0, 1), weight, targets.flatten(), softcap=self.softcap)


def capped(logits: Tensor, cap: float) -> Tensor:
    """``cap · tanh(logits / cap)``: nothing leaves −cap … cap. Source: Gemma 2, arXiv 2408.00118, section 2."""
    return cap * torch.tanh(logits / cap)
