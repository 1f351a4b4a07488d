"""Attention in one fused kernel, known by the memory that it takes: what stands for flex attention in a dry run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "planner::fused_attention"


@dataclass
class Kept:
    """Beside the result: the logarithm of each denominator, (B, H, T)."""

    lse: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Kept]:
    """Attend, in name: (B, H, T, K), (B, G, S, K), (B, G, S, U) to (B, H, T, U)."""
    y, lse = _forward(q, k, v)
    return y, Kept(lse)


@torch.library.custom_op(NAME, mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("there are no numbers in a dry run")


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    # As torch's kernel lays it out: like the queries, whose heads come after tokens in memory.
    return q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, lse = ctx.saved_tensors
    means = torch.empty_like(lse)  # each query's, of its gradient
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    del means
    return d_q, d_k, d_v


_forward.register_autograd(_backward, setup_context=_keep)
