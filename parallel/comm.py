"""Differentiable collectives over one axis; each says what its backward sends. None of them takes a parameter.

Between layers a rank of an axis holds its tokens, T/n of each row; inside a layer it holds all tokens and a share of
the layer. Sums inside a layer are partial on every rank: ``scatter`` adds them up on the way out, and the backward of
``gather`` those of the gradients on the way in. Source: sequence parallelism, arXiv 2205.05198, section 4.2.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Lane:
    """The ranks along one axis, and which of them this is.

    Attributes:
        group: of the ranks.
        rank: this rank's place among them, from 0.
        size: how many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int


def gather(x: Tensor, lane: Lane) -> Tensor:
    """All tokens from each rank's (one all-gather; backward one reduce-scatter).

    Example: of two ranks one has tokens 0 1, the other 2 3; both get 0 1 2 3.

    Args:
        x: (B, T/n, …), this rank's tokens.
        lane: the n ranks that share the rows.

    Returns:
        (B, T, …), on every rank the same; its gradient is summed over the ranks.
    """
    result: Tensor = _Gather.apply(x, lane)
    return result


def scatter(x: Tensor, lane: Lane) -> Tensor:
    """Sum over ranks, of which each keeps its tokens: (B, T, …) to (B, T/n, …) (one reduce-scatter; backward gathers).

    Example: two ranks with 1 2 3 4 and 10 20 30 40 get 11 22 and 33 44.
    """
    result: Tensor = _Scatter.apply(x, lane)
    return result


def add(x: Tensor, lane: Lane) -> Tensor:
    """Sum over ranks, and in the backward of the gradients, which are partial (one all-reduce each way)."""
    result: Tensor = _Add.apply(x, lane)
    return result


def join(x: Tensor, lane: Lane, *, width: int) -> Tensor:
    """Put each rank's part of the last dimension together (one all-gather), without a gradient.

    Example: a width of 5 over two ranks is 3 and 2 columns; the second sends one more, which is cut off.

    Args:
        x: (…, c), where c is ``width`` over the number of ranks, rounded up, and less on the last ranks.
        lane: the ranks.
        width: of the whole.
    """
    share = -(-width // lane.size)
    padded = torch.nn.functional.pad(x, (0, share - x.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(lane.size)]
    dist.all_gather(parts, padded, group=lane.group)
    return torch.cat(parts, dim=-1)[..., :width]


def swapped(x: Tensor, lane: Lane, *, peer: int, device: torch.device) -> Tensor:
    """What another rank has in the place of ``x`` (a send each way), without a gradient.

    Args:
        x: of the same shape and dtype on both.
        lane: the ranks.
        peer: place of the other among them.
        device: that the ranks communicate from; ``x`` may lie elsewhere.
    """
    ours = x.detach().to(device).contiguous()
    theirs = torch.empty_like(ours)
    sends = [
        dist.P2POp(dist.isend, ours, group=lane.group, group_peer=peer),
        dist.P2POp(dist.irecv, theirs, group=lane.group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
    return theirs.to(x.device)


def mine(x: Tensor, lane: Lane) -> Tensor:
    """This rank's tokens of (B, T, …); no communication."""
    return x.chunk(lane.size, dim=1)[lane.rank]


def _gathered(x: Tensor, lane: Lane) -> Tensor:
    """(B, T/n, …) to (B, T, …): parts arrive one after another, and rows are put together from them."""
    parts = x.new_empty(lane.size, *x.shape)
    dist.all_gather_single(parts.flatten(0, 1), x.contiguous(), group=lane.group)
    return parts.transpose(0, 1).flatten(1, 2)


def _scattered(x: Tensor, lane: Lane) -> Tensor:
    """(B, T, …) to (B, T/n, …), summed over the ranks."""
    parts = x.unflatten(1, (lane.size, -1)).transpose(0, 1).contiguous()
    result = torch.empty_like(parts[0])
    dist.reduce_scatter_single(result, parts.flatten(0, 1), group=lane.group)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lane: Lane) -> Tensor:
        ctx.lane = lane
        return _gathered(x, lane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scattered(grads[0], ctx.lane), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lane: Lane) -> Tensor:
        ctx.lane = lane
        return _scattered(x, lane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.lane), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lane: Lane) -> Tensor:
        ctx.lane = lane
        return _added(x, lane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _added(grads[0], ctx.lane), None


def _added(x: Tensor, lane: Lane) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=lane.group)
    return total
