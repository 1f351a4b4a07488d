"""The nearest orthogonal matrix, about: singular values driven to 1 by a polynomial of the matrix.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; the operations are those of torch.optim.Muon, one by
one, so that results are bitwise its.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-7  # least norm to divide by: torch.optim.Muon
BATCH = 8  # matrices of a product, where one does not fill a GPU; a guess of ours
LARGE = 2**20  # numbers of a matrix that does


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a matrix of ``dtype`` is orthogonalised in: bf16, but float64 where a run is in float64 to be exact."""
    return dtype if dtype is torch.float64 else torch.bfloat16


def orthogonal(matrices: Tensor, *, coefficients: Sequence[float], steps: int) -> Tensor:
    """Orthogonalise each of some matrices.

    A matrix comes out the same whatever the others are: on a CPU a batched product is bitwise that of its parts, and
    on CUDA, where a library may choose by their number, matrices of one size are always as many at a time.

    Args:
        matrices: (N, n, m), in the dtype to work in.
        coefficients: of the matrix, of its cube and of its fifth power, in one step.
        steps: how many.

    Returns:
        (N, n, m), whose singular values are near 1: from 0.7 to 1.2 with the usual coefficients and 5 steps.
    """
    if not len(matrices):
        return matrices
    few = 1 if matrices[0].numel() >= LARGE else BATCH
    return torch.cat([_batch(some, few, coefficients, steps) for some in matrices.split(few)])


def _batch(x: Tensor, full: int, coefficients: Sequence[float], steps: int) -> Tensor:
    n, (a, b, c) = len(x), coefficients
    if x.device.type == "cuda" and n < full:
        x = torch.cat([x, x.new_zeros(full - n, *x.shape[1:])])
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    # A norm for itself: over several dimensions of a batch torch adds up in another order.
    x = x / torch.stack([matrix.norm().clamp(min=EPS) for matrix in x])[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x)[:n]
