"""A bank of expert feed-forwards over rows grouped by expert."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """E SwiGLU experts whose weights are stacked.

    Parameters:
        gate, up: (E, F, D); down: (E, D, F).
    """

    def __init__(self, *, n_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.up = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Map rows (M, D) to (M, D); ``counts`` (E,) says how many rows each expert has."""
        product = grouped if grouped_is_faster(rows.device, rows.dtype) else looped
        sizes = counts if product is grouped else counts.tolist()
        h = F.silu(product(rows, self.gate, sizes)) * product(rows, self.up, sizes)
        return product(h, self.down, sizes)


def grouped_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``grouped_mm`` beats a loop over experts.

    A table and not a timing, so that a resumed run makes the choice of the run it continues. Measured on a CPU: fp32
    2.7 times slower than the loop, bf16 level with it; it refuses float64. On CUDA its kernel is for bf16.
    """
    return device.type == "cuda" and dtype is torch.bfloat16


def grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """All experts in one kernel: (M, d_in) by (E, d_out, d_in) to (M, d_out)."""
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)


def looped(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """One product an expert, written into one result: (M, d_in) by (E, d_out, d_in) to (M, d_out)."""
    return _Looped.apply(rows, weight.to(rows.dtype), counts)


class _Looped(torch.autograd.Function):
    """The loop as one node: no split, no concatenation, and each gradient written once where it belongs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            torch.mm(rows[start : start + count], weight[expert].t(), out=out[start : start + count])
            start += count
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0]
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        start = 0
        for expert, count in enumerate(ctx.counts):
            part = slice(start, start + count)
            if d_rows is not None:
                torch.mm(grad[part], weight[expert], out=d_rows[part])
            if d_weight is not None:
                torch.mm(grad[part].t(), rows[part], out=d_weight[expert])  # zero for an expert without rows
            start += count
        return d_rows, d_weight, None
