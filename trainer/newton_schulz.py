"""The nearest orthogonal matrix, about: singular values driven to 1 by a polynomial of the matrix.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; the operations are those of torch.optim.Muon, one by
one, so that results are bitwise its.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-7  # least norm to divide by: torch.optim.Muon
BATCH = 8  # matrices of a product on CUDA, where one does not fill it; a guess of ours
LARGE = 2**20  # numbers of a matrix that does


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a matrix of ``dtype`` is orthogonalised in: bf16, but float64 where a run is in float64 to be exact."""
    return dtype if dtype is torch.float64 else torch.bfloat16


def orthogonal(matrices: Tensor, *, coefficients: Sequence[float], steps: int) -> Tensor:
    """Orthogonalise each of some matrices, which comes out bitwise the same whatever the others are.

    On a CPU by products of one after another: a batched product takes another way by how many it holds, and of 4 x 255
    in bf16 some numbers differ. On CUDA, where a library may choose likewise, as many matrices of a size at a time.

    Args:
        matrices: (N, n, m), in the dtype to work in.
        coefficients: of the matrix, of its cube and of its fifth power, in one step.
        steps: how many.

    Returns:
        (N, n, m), whose singular values are near 1: from 0.7 to 1.2 with the usual coefficients and 5 steps.
    """
    if not len(matrices):
        return matrices
    if matrices.device.type != "cuda":
        return torch.stack([_polynomial(x, coefficients, steps) for x in matrices])
    full = 1 if matrices[0].numel() >= LARGE else BATCH
    return torch.cat([_filled_up(some, full, coefficients, steps) for some in matrices.split(full)])


def _filled_up(x: Tensor, full: int, coefficients: Sequence[float], steps: int) -> Tensor:
    """Some matrices and zeros, together ``full``."""
    zeros = x.new_zeros(full - len(x), *x.shape[1:])
    return _polynomial(torch.cat([x, zeros]), coefficients, steps)[: len(x)]


def _polynomial(x: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """Of one matrix or of several, (n, m) or (N, n, m)."""
    a, b, c = coefficients
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / _norm(x)
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _norm(x: Tensor) -> Tensor:
    """Of each matrix by itself: over several dimensions of a batch torch adds up in another order."""
    if x.ndim == 2:
        return x.norm().clamp(min=EPS)
    return torch.stack([_norm(matrix) for matrix in x])[:, None, None]
