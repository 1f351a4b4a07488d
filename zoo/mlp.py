"""Feed-forward layers."""

from typing import Any

import torch
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
        return self.down(swiglu(self.gate(x), self.up(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``, keeping only its two arguments for the backward."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Computes silu again in the backward: as fast as keeping it, and a third less memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])
