"""A bank of expert feed-forwards over rows grouped by expert."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.activation import GATED, activate
from zoo.config_ff import Activation, MoEConfig
from zoo.linear import product_dtype


class Experts(nn.Module):
    """E gated experts whose weights are stacked.

    Parameters:
        gate, up: (E, F, D); down: (E, D, F).
        gate_bias, up_bias: (E, F); down_bias: (E, D); None without ``config.bias``.

    Attributes:
        grouped: whether all experts run in one kernel, or one after another; chosen when a model is built for a device.
    """

    def __init__(self, config: MoEConfig, *, d_model: int) -> None:
        super().__init__()
        n_experts, d_expert = config.n_experts, config.d_expert
        self.grouped = False
        self.activation = config.activation
        self.gate = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.up = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.gate_bias = nn.Parameter(torch.empty(n_experts, d_expert)) if config.bias else None
        self.up_bias = nn.Parameter(torch.empty(n_experts, d_expert)) if config.bias else None
        self.down_bias = nn.Parameter(torch.empty(n_experts, d_model)) if config.bias else None

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Map rows (M, D) to (M, D); ``counts`` (E,) says how many rows each expert has."""
        if self.grouped:
            return self._grouped(rows, counts)
        bank = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        rounded = [None if each is None else each.to(rows.dtype) for each in bank]
        return _Looped.apply(rows, *rounded, counts.tolist(), self.activation)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        owned = None if self.gate_bias is None else ownership(ends, rows)
        gate = _plus(grouped(rows, self.gate, ends), owned, self.gate_bias)
        up = _plus(grouped(rows, self.up, ends), owned, self.up_bias)
        return _plus(grouped(activate(gate, up, self.activation), self.down, ends), owned, self.down_bias)


def grouped_is_faster(device: torch.device, dtype: torch.dtype, *, widths: Sequence[int]) -> bool:
    """Whether ``grouped_mm`` beats a loop over experts whose matrices have these ``widths``.

    A table and not a timing, so that a resumed run makes the choice of the run it continues. Forward and backward on a
    CPU, loop against grouped, one thread: 32 experts of 352 x 512 over 16,384 rows 405 against 425 ms in fp32 and 1,777
    against 1,772 in bf16; 16 of 64 x 192 over 8,192 rows 16.7 against 17.4 and 69.6 against 69.4; only toys differ (16
    of 32 x 64 over 1,024 rows: 1.5 against 0.9), and a CPU with AMX favoured the loop 2.7 times. float64 is refused. On
    CUDA the kernel is for bf16 and rows of whole 16 bytes; not measured by us yet.
    """
    aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
    return device.type == "cuda" and dtype is torch.bfloat16 and aligned


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """All experts in one kernel: (M, d_in) by (E, d_out, d_in) to (M, d_out); ``ends`` (E,) int32 of their rows."""
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)


def ownership(ends: Tensor, rows: Tensor) -> Tensor:
    """Whose each of (M, …) rows is, as zeros and ones (M, E) in the rows' dtype.

    Example: ends 2 2 3 give 100 100 001.
    """
    index = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    experts = torch.arange(ends.shape[0], device=rows.device)
    return (torch.searchsorted(ends, index, right=True)[:, None] == experts).to(rows.dtype)


def _plus(y: Tensor, owned: Tensor | None, bias: Tensor | None) -> Tensor:
    """Add to each row its expert's bias: a product, whose gradient, unlike that of indexing, needs no atomic sums."""
    if owned is None or bias is None:
        return y
    return torch.addmm(y, owned, bias.to(y.dtype))


class _Looped(torch.autograd.Function):
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
        counts: list[int],
        activation: Activation,
    ) -> Tensor:
        wide, kind = product_dtype(rows.dtype, rows.device.type), GATED[activation]
        g = rows.new_empty(rows.shape[0], gate.shape[1], dtype=wide)
        u, y = torch.empty_like(g), torch.empty_like(rows, dtype=wide)
        for expert, part in _parts(counts):
            x = rows[part].to(wide)
            _product(x, gate, gate_bias, expert, out=g[part])
            _product(x, up, up_bias, expert, out=u[part])
            _product(kind.arm(g[part]).mul_(kind.scale(u[part])), down, down_bias, expert, out=y[part])
        ctx.save_for_backward(rows, gate, up, down, g, u)
        ctx.counts, ctx.kind, ctx.biased = counts, kind, gate_bias is not None
        return y.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, down, g, u = ctx.saved_tensors
        wide, kind = g.dtype, ctx.kind
        d_rows, d_gate, d_up, d_down = (torch.empty_like(each, dtype=wide) for each in (rows, gate, up, down))
        d_biases = [each.new_empty(each.shape[:2], dtype=wide) for each in (gate, up, down)] if ctx.biased else []
        for expert, part in _parts(ctx.counts):  # products and sums of no rows write zeros
            x, grad = rows[part].to(wide), grads[0][part].to(wide)
            arm, scale = kind.arm(g[part]), kind.scale(u[part])
            torch.mm(grad.t(), arm * scale, out=d_down[expert])
            d_h = torch.mm(grad, down[expert].to(wide))
            d_u = kind.d_scale(arm.mul_(d_h), u[part])
            d_g = kind.d_arm(d_h.mul_(scale), g[part])
            torch.mm(d_g.t(), x, out=d_gate[expert])
            torch.mm(d_u.t(), x, out=d_up[expert])
            torch.mm(d_g, gate[expert].to(wide), out=d_rows[part]).addmm_(d_u, up[expert].to(wide))
            for d_bias, each in zip(d_biases, (d_g, d_u, grad), strict=False):  # none without biases
                torch.sum(each, dim=0, out=d_bias[expert])
        found = [each.to(rows.dtype) for each in (d_rows, d_gate, d_up, d_down, *d_biases)]
        return *found, *([] if ctx.biased else [None] * 3), None, None


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
