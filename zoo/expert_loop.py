"""Expert feed-forwards one after another.

The two loops are operators of torch, ``zoo::expert_loop`` and ``zoo::expert_loop_backward``, because how many rows an
expert has is known to the device alone: what traces a model (compilation, a dry run) sees one operator of known shapes
and never asks, and what keeps the results of products through activation checkpointing sees their results.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.activation import GATED
from zoo.config_ff import Activation
from zoo.linear import product_dtype


class Looped(torch.autograd.Function):
    """All experts as one node: each result is written once where it belongs, and an expert's part stays in cache.

    Kept for the backward are the rows and what the two inner products gave, not what becomes of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        counts: Tensor,
        activation: Activation,
    ) -> Tensor:
        """Map rows (M, D), grouped by expert, to (M, D); ``counts`` (E,) of them are each expert's."""
        biases = (gate_bias, up_bias, down_bias)
        y, g, u = _forward(rows, gate, up, down, *biases, counts, activation.value)
        ctx.save_for_backward(rows, gate, up, down, g, u, counts)
        ctx.activation, ctx.biased = activation.value, gate_bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, matrices and biases."""
        found = _backward(grads[0], *ctx.saved_tensors, ctx.activation, ctx.biased)
        return *found, *([] if ctx.biased else [None] * 3), None, None


@torch.library.custom_op("zoo::expert_loop", mutates_args=())
def _forward(
    rows: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    counts: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (M, D) and what the two inner products gave, (M, F) each."""
    wide, kind = product_dtype(rows.dtype, rows.device.type), GATED[Activation(activation)]
    g = rows.new_empty(rows.shape[0], gate.shape[1], dtype=wide)
    u, y = torch.empty_like(g), torch.empty_like(rows, dtype=wide)
    for expert, part in _parts(counts.tolist()):
        x = rows[part].to(wide)
        _product(x, gate, gate_bias, expert, out=g[part])
        _product(x, up, up_bias, expert, out=u[part])
        _product(kind.arm(g[part]).mul_(kind.scale(u[part])), down, down_bias, expert, out=y[part])
    return y.to(rows.dtype), g, u


@_forward.register_fake
def _(rows: Tensor, gate: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = product_dtype(rows.dtype, rows.device.type)
    inner = (rows.shape[0], gate.shape[1])
    return torch.empty_like(rows), rows.new_empty(inner, dtype=wide), rows.new_empty(inner, dtype=wide)


@torch.library.custom_op("zoo::expert_loop_backward", mutates_args=())
def _backward(
    grad: Tensor,
    rows: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    g: Tensor,
    u: Tensor,
    counts: Tensor,
    activation: str,
    biased: bool,
) -> list[Tensor]:
    """Gradients of rows, of the three matrices and, if there are some, of the three biases."""
    wide, kind = g.dtype, GATED[Activation(activation)]
    d_rows, d_gate, d_up, d_down = (torch.empty_like(each, dtype=wide) for each in (rows, gate, up, down))
    d_biases = [each.new_empty(each.shape[:2], dtype=wide) for each in (gate, up, down)] if biased else []
    for expert, part in _parts(counts.tolist()):  # products and sums of no rows write zeros
        x, d_y = rows[part].to(wide), grad[part].to(wide)
        arm, scale = kind.arm(g[part]), kind.scale(u[part])
        torch.mm(d_y.t(), arm * scale, out=d_down[expert])
        d_h = torch.mm(d_y, down[expert].to(wide))
        d_u = kind.d_scale(arm.mul_(d_h), u[part])
        d_g = kind.d_arm(d_h.mul_(scale), g[part])
        torch.mm(d_g.t(), x, out=d_gate[expert])
        torch.mm(d_u.t(), x, out=d_up[expert])
        torch.mm(d_g, gate[expert].to(wide), out=d_rows[part]).addmm_(d_u, up[expert].to(wide))
        for d_bias, each in zip(d_biases, (d_g, d_u, d_y), strict=False):  # none without biases
            torch.sum(each, dim=0, out=d_bias[expert])
    return [each.to(rows.dtype) for each in (d_rows, d_gate, d_up, d_down, *d_biases)]


@_backward.register_fake
def _(grad: Tensor, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, *others: Any) -> list[Tensor]:
    *_, biased = others
    matrices = [torch.empty_like(each) for each in (rows, gate, up, down)]
    return matrices + ([each.new_empty(each.shape[:2]) for each in (gate, up, down)] if biased else [])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, *, out: Tensor) -> None:
    """What one expert's matrix makes of its rows (m, d_in), into ``out`` (m, d_out), in the dtype of both."""
    matrix = weight[expert].to(x.dtype).t()
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias[expert].to(x.dtype), x, matrix, out=out)


def _parts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows.

    Example: counts 2 0 1 give rows 0:2, 2:2 and 2:3.
    """
    start = 0
    for expert, count in enumerate(counts):
        yield expert, slice(start, start + count)
        start += count
