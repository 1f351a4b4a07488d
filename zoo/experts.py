"""A bank of expert feed-forwards over rows grouped by expert."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.linear import product_dtype
from zoo.mlp import swiglu


class Experts(nn.Module):
    """E SwiGLU experts whose weights are stacked.

    Parameters:
        gate, up: (E, F, D); down: (E, D, F).

    Attributes:
        grouped: whether all experts run in one kernel, or one after another; chosen when a model is built for a device.
    """

    def __init__(self, *, n_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.grouped = False
        self.gate = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.up = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Map rows (M, D) to (M, D); ``counts`` (E,) says how many rows each expert has."""
        if self.grouped:
            ends = counts.cumsum(0).to(torch.int32)
            h = swiglu(grouped(rows, self.gate, ends), grouped(rows, self.up, ends))
            return grouped(h, self.down, ends)
        return looped(rows, self.gate, self.up, self.down, counts.tolist())


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


def looped(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """The bank as one product after another: rows (M, D), weights as in ``Experts``, to (M, D)."""
    dtype = rows.dtype
    return _Looped.apply(rows, gate.to(dtype), up.to(dtype), down.to(dtype), counts)


class _Looped(torch.autograd.Function):
    """All experts as one node: each result is written once where it belongs, and an expert's part stays in cache.

    Kept for the backward are the rows and what the two inner products gave, not what becomes of them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        wide = product_dtype(rows.dtype, rows.device.type)
        g = rows.new_empty(rows.shape[0], gate.shape[1], dtype=wide)
        u, y = torch.empty_like(g), torch.empty_like(rows, dtype=wide)
        for expert, part in _parts(counts):
            x = rows[part].to(wide)
            torch.mm(x, gate[expert].to(wide).t(), out=g[part])
            torch.mm(x, up[expert].to(wide).t(), out=u[part])
            torch.mm(F.silu(g[part]).mul_(u[part]), down[expert].to(wide).t(), out=y[part])
        ctx.save_for_backward(rows, gate, up, down, g, u)
        ctx.counts = counts
        return y.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, gate, up, down, g, u = ctx.saved_tensors
        wide = g.dtype
        d_rows, d_gate, d_up, d_down = (torch.empty_like(each, dtype=wide) for each in (rows, gate, up, down))
        for expert, part in _parts(ctx.counts):  # products of no rows write zeros
            x, grad, silu = rows[part].to(wide), grads[0][part].to(wide), F.silu(g[part])
            torch.mm(grad.t(), silu * u[part], out=d_down[expert])
            d_h = torch.mm(grad, down[expert].to(wide))
            d_u = silu.mul_(d_h)
            d_g = torch.ops.aten.silu_backward(d_h.mul_(u[part]), g[part])
            torch.mm(d_g.t(), x, out=d_gate[expert])
            torch.mm(d_u.t(), x, out=d_up[expert])
            torch.mm(d_g, gate[expert].to(wide), out=d_rows[part]).addmm_(d_u, up[expert].to(wide))
        return d_rows.to(rows.dtype), d_gate.to(gate.dtype), d_up.to(up.dtype), d_down.to(down.dtype), None


def _parts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows.

    Example: counts 2 0 1 give rows 0:2, 2:2 and 2:3.
    """
    start = 0
    for expert, count in enumerate(counts):
        yield expert, slice(start, start + count)
        start += count
