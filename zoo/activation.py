"""What stands between the matrices of a feed-forward layer.

All kinds with a gate are a product ``arm(gate) · scale(up)``, and only gate and up are kept for the backward: computing
the arms again is as fast as keeping them, and a third less memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config_ff import Activation

LIMIT, ALPHA = 7.0, 1.702
"""Of ``swiglu_clamped``: ``swiglu_limit`` and ``swiglu_alpha`` of gpt-oss, transformers' configuration_gpt_oss.py;
openai/gpt-oss, gpt_oss/torch/model.py:swiglu has the same."""


@dataclass(frozen=True)
class Gated:
    """The two arms of a gated kind.

    Attributes:
        arm: of the gate; a new tensor, which the caller may overwrite.
        d_arm: gradient for the gate, from that of the arm and the gate.
        scale: of up; up itself if nothing happens to it.
        d_scale: gradient for up, from that of the scale, which it may overwrite, and up.
    """

    arm: Callable[[Tensor], Tensor]
    d_arm: Callable[[Tensor, Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]
    d_scale: Callable[[Tensor, Tensor], Tensor]


def activate(gate: Tensor | None, up: Tensor, activation: Activation) -> Tensor:
    """Combine gate (…, F), None if the kind has none, and up (…, F) to (…, F)."""
    if gate is None:
        assert activation not in GATED, f"{activation=}"
        return F.gelu(up, approximate="tanh")
    return _Product.apply(gate, up, activation)


class _Product(torch.autograd.Function):
    """``arm(gate) · scale(up)``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        kind = GATED[activation]
        return kind.arm(gate).mul_(kind.scale(up))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        kind = GATED[ctx.activation]
        d_up = kind.d_scale(kind.arm(gate).mul_(grads[0]), up)
        return kind.d_arm(grads[0] * kind.scale(up), gate), d_up, None


def _same(up: Tensor) -> Tensor:
    return up


def _d_same(grad: Tensor, up: Tensor) -> Tensor:
    return grad


def _gelu(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _d_gelu(grad: Tensor, gate: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")


def _clamped_silu(gate: Tensor) -> Tensor:
    """``g · sigmoid(α g)`` of g = min(gate, limit): only large values are cut, small ones die out by themselves."""
    below = gate.clamp(max=LIMIT)
    return torch.sigmoid(ALPHA * below).mul_(below)


def _d_clamped_silu(grad: Tensor, gate: Tensor) -> Tensor:
    """The arm is ``silu(α g) / α``, whose slope is that of silu at α g; none beyond the limit."""
    slope = torch.ops.aten.silu_backward(grad, ALPHA * gate.clamp(max=LIMIT))
    return slope.masked_fill_(gate > LIMIT, 0)


def _clamped_plus_one(up: Tensor) -> Tensor:
    return up.clamp(-LIMIT, LIMIT).add_(1)


def _d_clamped_plus_one(grad: Tensor, up: Tensor) -> Tensor:
    return grad.masked_fill_(up.abs() > LIMIT, 0)


GATED = {
    Activation.swiglu: Gated(F.silu, torch.ops.aten.silu_backward, _same, _d_same),
    Activation.geglu: Gated(_gelu, _d_gelu, _same, _d_same),
    Activation.swiglu_clamped: Gated(_clamped_silu, _d_clamped_silu, _clamped_plus_one, _d_clamped_plus_one),
}
