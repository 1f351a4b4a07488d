"""The machine's matrix-product limit: the products of one step, and nothing else."""

import torch

from benchmarks.shape import Shape


class Limit:
    """Forward and both backward products of every linear map of a step, as bare ``torch.mm`` into buffers that exist.

    Each shape has one set of operands: the next product of the same shape finds them in a cache as warm as it gets.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype) -> None:
        self.linears = shape.linears
        self.operands = {key: _operands(*key, dtype=dtype) for key in set(self.linears)}

    def __call__(self) -> None:
        """All products of one step."""
        for key in self.linears:
            x, w, y, dx, dw = self.operands[key]
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=dx)
            torch.mm(y.t(), x, out=dw)

    @property
    def flops(self) -> int:
        """Floating-point operations of one step."""
        return sum(6 * n * d_in * d_out for n, d_in, d_out in self.linears)


def _operands(n: int, d_in: int, d_out: int, *, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """X (n, d_in), w (d_out, d_in), y (n, d_out), dx, dw; small enough that repeated products stay finite."""
    x, w = torch.randn(n, d_in).to(dtype), (torch.randn(d_out, d_in) / d_in).to(dtype)
    return x, w, torch.empty(n, d_out, dtype=dtype), torch.empty_like(x), torch.empty_like(w)
