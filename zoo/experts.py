"""A bank of expert feed-forwards over rows grouped by expert."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.activation import activate
from zoo.config_ff import MoEConfig
from zoo.expert_loop import Looped


class Experts(nn.Module):
    """E gated experts whose weights are stacked.

    Parameters:
        gate, up: (E, F, D); down: (E, D, F).
        gate_bias, up_bias: (E, F); down_bias: (E, D); None without ``config.bias``.

    Attributes:
        grouped: whether all experts run in one kernel, or one after another; chosen when a model is built for a device.
        adds_bias: whether ``down_bias`` is added, if there is one; where ranks hold parts of the sum, one of them does.
    """

    def __init__(self, config: MoEConfig, *, d_model: int) -> None:
        super().__init__()
        n_experts, d_expert = config.n_experts, config.d_expert
        self.grouped = False
        self.adds_bias = True
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
        down_bias: Tensor | None = self.down_bias
        if down_bias is not None and not self.adds_bias:
            down_bias = torch.zeros_like(down_bias, requires_grad=False)  # the loop has all three biases or none
        bank = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, down_bias)
        rounded = [None if each is None else each.to(rows.dtype) for each in bank]
        return Looped.apply(rows, *rounded, counts, self.activation)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        owned = None if self.gate_bias is None else ownership(ends, rows)
        gate = _plus(grouped(rows, self.gate, ends), owned, self.gate_bias)
        up = _plus(grouped(rows, self.up, ends), owned, self.up_bias)
        down = grouped(activate(gate, up, self.activation), self.down, ends)
        return _plus(down, owned, self.down_bias) if self.adds_bias else down


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
