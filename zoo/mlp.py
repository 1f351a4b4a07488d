"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.linear import Linear


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate x) · up x)``. Source: arXiv 2002.05202."""

    def __init__(self, *, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = Linear(d_model, d_ff)
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
