"""Context parallelism: the ranks of an axis (cp) each have some tokens of the same rows, T/n of T.

A row is cut into 2 n chunks, of which rank r has chunks r and 2 n - 1 - r, its head and its tail: late tokens see more
than early ones, and so all ranks have as much to attend to. Source: arXiv 2407.21783, section 3.3.2.

Here: that layout, the collectives that go with it, and what layers then share. What mixers do is in
parallel/context_kernels.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm import Lane
from zoo.context import Context
from zoo.mask import Mask


def own(x: Tensor, lane: Lane, *, dim: int = 1) -> Tensor:
    """This rank's tokens of whole rows: its head and its tail; no communication.

    Example: of tokens 0 1 2 3 4 5 6 7 the first of two ranks has 0 1 6 7, the second 2 3 4 5; of 0 1 2 3 4 5 three
    ranks have 0 5, 1 4 and 2 3.

    Args:
        x: whole rows, the same on every rank.
        lane: the n ranks that share them.
        dim: that counts tokens, a multiple of 2 n of them.

    Returns:
        The same with 1/n of the tokens.
    """
    assert x.shape[dim] % (2 * lane.size) == 0, f"{x.shape=} {dim=} {lane.size=}"
    chunks = x.chunk(2 * lane.size, dim=dim)
    return torch.cat([chunks[lane.rank], chunks[-1 - lane.rank]], dim=dim)


def natural(x: Tensor, lane: Lane, *, dim: int = 1) -> Tensor:
    """Rows in order, from all ranks' tokens one rank after another, as ``comm.gather`` gives them; no communication.

    Example: two ranks' 0 1 6 7 and 2 3 4 5, that is 0 1 6 7 2 3 4 5, become 0 1 2 3 4 5 6 7.

    Args:
        x: tokens of rank 0, then of rank 1, …
        lane: the n ranks.
        dim: that counts tokens.
    """
    chunks = x.chunk(2 * lane.size, dim=dim)
    return torch.cat([*chunks[::2], *chunks[::-2]], dim=dim)


def stretches(lane: Lane, length: int) -> tuple[range, range]:
    """Which columns of rows of ``length`` tokens this rank has: its head and its tail.

    Example: of rows of 8 the first of two ranks has columns 0 … 1 and 6 … 7, the second 2 … 3 and 4 … 5.
    """
    size = length // (2 * lane.size)
    first, last = lane.rank * size, (2 * lane.size - 1 - lane.rank) * size
    return range(first, first + size), range(last, last + size)


def gather_rows(x: Tensor, lane: Lane) -> Tensor:
    """Whole rows in order from each rank's tokens (one all-gather over cp; backward one reduce-scatter).

    Example: two ranks with 0 1 6 7 and 2 3 4 5 both get 0 1 2 3 4 5 6 7.

    Args:
        x: (B, T/n, …), this rank's tokens.
        lane: the n ranks.

    Returns:
        (B, T, …), on every rank the same; its gradient is summed over the ranks, in its dtype.
    """
    result: Tensor = _GatherRows.apply(x, lane)
    return result


@torch.no_grad()
def join_rows(x: Tensor, lane: Lane) -> Tensor:
    """As ``gather_rows``, without a gradient, such as of logits (B, T/n, V) (one all-gather over cp)."""
    return gather_rows(x, lane)


def to_rows(x: Tensor, lane: Lane) -> Tensor:
    """Own tokens of all heads to whole rows of some heads (one all-to-all over cp, and another in the backward).

    Example: two ranks have tokens 0 1 6 7 and 2 3 4 5 of heads a b. The first gets a0 a1 … a7, the second b0 b1 … b7.

    Args:
        x: (B, T/n, n, W): last, what is for each rank.
        lane: the n ranks.

    Returns:
        (B, T, W), rows in order.
    """
    result: Tensor = _ToRows.apply(x, lane)
    return result


def to_own(x: Tensor, lane: Lane) -> Tensor:
    """Whole rows of some heads to own tokens of all heads: the reverse of ``to_rows`` (one all-to-all, as there).

    Example: two ranks have a0 a1 … a7 and b0 b1 … b7. The first gets tokens 0 1 6 7 of a and of b, the second 2 3 4 5.

    Args:
        x: (B, T, W), rows in order.
        lane: the n ranks.

    Returns:
        (B, T/n, n, W): last, what came from each rank.
    """
    result: Tensor = _ToOwn.apply(x, lane)
    return result


@dataclass(kw_only=True)
class RowContext(Context):
    """What layers share on a rank that has some tokens of each row: positions are theirs, masks are of whole rows.

    Attributes:
        row_positions: (B, T), of whole rows, which every rank has.
        row_documents: (B, T), of whole rows; None: each is one document.
    """

    row_positions: Tensor
    row_documents: Tensor | None

    @classmethod
    def cut(
        cls,
        positions: Tensor,
        documents: Tensor | None,
        *,
        lane: Lane,
        dtype: torch.dtype,
        length: int,
        rows: Tensor | None = None,
    ) -> "RowContext":
        """From positions and documents of whole rows, (B, T); no communication. The rest as in a ``Context``."""
        return cls(
            own(positions, lane),
            None if documents is None else own(documents, lane),
            dtype,
            length,
            rows,
            row_positions=positions,
            row_documents=documents,
        )

    def mask(self, *, window: int | None = None, chunk: int | None = None) -> Mask:
        """Who sees whom in whole rows; layers with equal windows and chunks share one."""
        result = Mask(self.row_documents, self.row_positions, window, chunk)
        return self.masks.setdefault((result.window, result.chunk), result)


def _in_order(parts: Tensor) -> Tensor:
    """(n, B, T/n, …), tokens of each rank, as whole rows (B, T, …).

    Example: of two ranks' 0 1 6 7 and 2 3 4 5 the heads are 0 1 and 2 3, the tails, from the last rank to the first,
    4 5 and 6 7.
    """
    halves = parts.unflatten(2, (2, -1))  # (n, B, 2, T/2n, …)
    return torch.cat([halves[:, :, 0], halves[:, :, 1].flip(0)]).transpose(0, 1).flatten(1, 2)


def _by_rank(x: Tensor, size: int) -> Tensor:
    """Whole rows (B, T, …) as tokens of each rank, (n, B, T/n, …): the reverse of ``_in_order``."""
    chunks = x.unflatten(1, (2 * size, -1)).transpose(0, 1)  # (2n, B, T/2n, …)
    return torch.stack([chunks[:size], chunks[size:].flip(0)], dim=2).flatten(2, 3)


def _gathered(x: Tensor, lane: Lane) -> Tensor:
    parts = x.new_empty(lane.size, *x.shape)
    dist.all_gather_single(parts.flatten(0, 1), x.contiguous(), group=lane.group)
    return _in_order(parts)


def _scattered(x: Tensor, lane: Lane) -> Tensor:
    parts = _by_rank(x, lane.size).contiguous()
    result = torch.empty_like(parts[0])
    dist.reduce_scatter_single(result, parts.flatten(0, 1), group=lane.group)
    return result


def _exchanged(parts: Tensor, lane: Lane) -> Tensor:
    """(n, …), something for each rank, to what each has for this one."""
    parts = parts.contiguous()
    result = torch.empty_like(parts)
    dist.all_to_all_single(result, parts, group=lane.group)
    return result


def _rows_of_some(x: Tensor, lane: Lane) -> Tensor:
    return _in_order(_exchanged(x.permute(2, 0, 1, 3), lane))


def _own_of_all(x: Tensor, lane: Lane) -> Tensor:
    return _exchanged(_by_rank(x, lane.size), lane).permute(1, 2, 0, 3)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lane: Lane) -> Tensor:
        ctx.lane = lane
        return _gathered(x, lane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scattered(grads[0], ctx.lane), None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lane: Lane) -> Tensor:
        ctx.lane = lane
        return _rows_of_some(x, lane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _own_of_all(grads[0], ctx.lane), None


class _ToOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lane: Lane) -> Tensor:
        ctx.lane = lane
        return _own_of_all(x, lane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _rows_of_some(grads[0], ctx.lane), None
