"""From the last state to logits, or straight to a loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.linear import product_dtype, widened

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(N, D) states, (V, D) weight, (N,) targets → their summed loss, a scalar."""


class Head(nn.Module):
    """The projection to the vocabulary. A tied head owns no weight: it is given the embedding's."""

    def __init__(self, *, d_model: int, vocab_size: int, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, h: Tensor, embedding: Tensor, targets: Tensor | None = None, loss: Loss | None = None) -> Tensor:
        """Logits (B, T, V) of states (B, T, D); with ``targets`` (B, T), the summed loss without those logits."""
        weight = embedding if self.weight is None else self.weight
        if targets is None or loss is None:
            return F.linear(h.to(product_dtype(h.dtype, h.device.type)), widened(weight, h.dtype)).to(h.dtype)
        return loss(h.flatten(0, 1), weight, targets.flatten())
