"""The one matrix product of every layer."""

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """``y = x Wᵀ + b``, computed in the dtype of ``x``, whatever the dtype in which the parameters are kept.

    Attributes:
        adds_bias: whether it does; where ranks hold parts of the sum that ``x Wᵀ`` is, one of them.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.adds_bias = True

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, d_in) to (…, d_out)."""
        bias = self.bias if self.adds_bias else None
        if product_dtype(x.dtype, x.device.type) is not x.dtype:
            return _Widened.apply(x, self.weight, bias)
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@cache
def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What numbers of ``dtype`` are multiplied in on this machine.

    An x86 CPU without bf16 instructions emulates them at a quarter of its speed in fp32 (4096 x 512 x 1408, one core:
    193 against 42 ms). There, bf16 numbers are widened first: it is the same arithmetic, since their products are exact
    in fp32 and are summed in fp32 either way.
    """
    if dtype is torch.bfloat16 and device == "cpu" and platform.machine() == "x86_64":
        if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            return torch.float32
    return dtype


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight rounded to ``dtype``, in what numbers of it are multiplied in."""
    rounded = weight.to(dtype)
    return rounded.to(product_dtype(dtype, weight.device.type))


class _Widened(torch.autograd.Function):
    """A product of widened numbers, rounded back; what is kept for the backward stays narrow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide = product_dtype(x.dtype, x.device.type)
        y = F.linear(x.to(wide), widened(weight, x.dtype), None if bias is None else widened(bias, x.dtype))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = product_dtype(x.dtype, x.device.type)
        grad, rows = grads[0].flatten(0, -2).to(wide), x.flatten(0, -2).to(wide)
        d_x = torch.mm(grad, widened(weight, x.dtype)).to(x.dtype).view(x.shape)
        d_bias = None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype)
        return d_x, torch.mm(grad.t(), rows).to(weight.dtype), d_bias
