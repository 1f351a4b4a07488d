"""Sums, norms and whole tensors across ranks: the only place that looks at a parameter as a whole."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh


def total(x: Tensor, mesh: Mesh, *, axis: str = "dp") -> Tensor:
    """Sum ``x`` over ``axis`` in place (one all-reduce) and return it."""
    group = mesh.group(axis)
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def whole(x: Tensor) -> Tensor:
    """A parameter, gradient or moment as one plain tensor (one all-gather over dp_shard when it is sharded)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's part of a parameter, gradient or moment; no communication."""
    return x.to_local() if isinstance(x, DTensor) else x


def norm(gradients: Iterable[Tensor], mesh: Mesh) -> Tensor:
    """Euclidean norm of all gradients of the model, the same on every rank (one all-reduce over dp_shard)."""
    squares = [torch.linalg.vector_norm(local(g), dtype=_wide(g.dtype)).square() for g in gradients]
    return total(torch.stack(squares).sum(), mesh, axis="dp_shard").sqrt()


def clip(gradients: Iterable[Tensor], *, norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their norm is at most ``max_norm``; no communication."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_([local(g) for g in gradients], factor)


def gradients(model: nn.Module) -> list[Tensor]:
    """Gradients of the parameters that have one, in the order of parameters."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
