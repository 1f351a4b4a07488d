"""Sums, norms and whole tensors across ranks: the only place that looks at a parameter as a whole."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from parallel.layout import Placed, stored_name
from parallel.mesh import Mesh


def total(x: Tensor, mesh: Mesh, *, axis: str = "dp") -> Tensor:
    """Sum ``x`` over ``axis`` in place (one all-reduce) and return it."""
    group = mesh.group(axis)
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def views(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``view`` of each of some tensors by the names of parameters; others, such as buffers, as they are."""
    return {name: view(model, name, x) for name, x in tensors.items()}


def view(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """A parameter, gradient or moment as one tensor over all ranks, on the same memory; no communication.

    What is shared over dp_shard and cp is a DTensor of FSDP2; what the plan cuts besides becomes one over a grid of all
    ranks that have this layer (``parallel/layout.py``).

    Args:
        model: a spread model.
        name: of the parameter.
        x: as the model, its optimizer or the backward holds it.
    """
    if not isinstance(model, Placed) or stored_name(name) not in model.places or not x.ndim:
        return x
    return model.places[stored_name(name)].view(x)


def part(x: DTensor) -> tuple[slice, ...]:
    """Where in the whole this rank's part lies."""
    sizes, corner = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(slice(first, first + n) for first, n in zip(corner, sizes, strict=True))


def whole(x: Tensor) -> Tensor:
    """What ``view`` gives as one plain tensor (one all-gather for each axis that shares it)."""
    if not isinstance(x, DTensor):
        return x
    # What is offloaded lies on the host, which NCCL does not reach.
    there = cast(DTensor, x.to(x.device_mesh.device_type))
    if any(isinstance(placement, _StridedShard) for placement in x.placements):  # by itself torch warns of two steps
        once = [Replicate() if isinstance(placement, _StridedShard) else placement for placement in x.placements]
        there = there.redistribute(placements=once)
    return there.full_tensor()


def local(x: Tensor) -> Tensor:
    """This rank's part of a parameter, gradient or moment; no communication."""
    return x.to_local() if isinstance(x, DTensor) else x


def complete(model: nn.Module) -> None:
    """Sum gradients of what several ranks have, once all are there (all-reduces over tp and its copies, then over pp).

    Each of those ranks has a part of them (``parallel/tensor.py``, ``parallel/pipeline.py``).
    """
    if not isinstance(model, Placed):
        return
    shared: dict[int, list[Tensor]] = {}
    groups = {}
    for name, parameter in model.named_parameters():
        place = model.places[stored_name(name)]
        if place.copies is not None:
            if parameter.grad is None:  # of a bias that another rank adds
                parameter.grad = torch.zeros_like(parameter)
            shared.setdefault(place.tp.copies, []).append(local(parameter.grad))
            groups[place.tp.copies] = place.copies, place.grid.device_type
    for copies in sorted(shared):
        _add_up(shared[copies], *groups[copies])
    model.sum_copies()


def _add_up(gradients: list[Tensor], group: dist.ProcessGroup, device: str) -> None:
    """Sum tensors in place over a group (one all-reduce)."""
    flat = torch.cat([gradient.flatten() for gradient in gradients]).to(device)
    dist.all_reduce(flat, group=group)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))


def squares(model: nn.Module, mesh: Mesh, tensors: Mapping[str, Tensor], *, names: Sequence[str]) -> Tensor:
    """Sum of the squares of each whole parameter, gradient or change of one (one all-reduce over pp, fsdp and tp).

    What several ranks have counts once.

    Args:
        model: a spread model.
        mesh: over which it is.
        tensors: as the model holds them, by the names of its parameters; not all have to be there.
        names: of all parameters of the whole model.

    Returns:
        (names,), on every rank the same; 0 for what no rank has.
    """
    (dtype,) = {_wide(parameter.dtype) for parameter in model.parameters()}
    found = {
        stored_name(name): torch.linalg.vector_norm(local(x), dtype=dtype).square()
        for name, x in tensors.items()
        if _counts(model, name)
    }
    nothing = torch.zeros((), dtype=dtype, device=next(model.parameters()).device)
    each = torch.stack([found.get(name, nothing) for name in names])
    return total(each.to(mesh.device), mesh, axis="shards")  # of what is offloaded, the host has made it


def _counts(model: nn.Module, name: str) -> bool:
    if not isinstance(model, Placed):
        return True
    return name not in model.copies and model.places[stored_name(name)].tp.first


def clip(gradients: Iterable[Tensor], *, norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their norm is at most ``max_norm``; no communication."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    parts = [local(g) for g in gradients]
    torch._foreach_mul_(parts, factor.to(parts[0].device))


def gradients(model: nn.Module) -> list[Tensor]:
    """Gradients of the parameters that have one, in the order of parameters."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
