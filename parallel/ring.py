"""Ring attention: keys and values of each rank's tokens go round, while queries attend to those that are there.

Each block of queries and keys gives a result and the logarithm of its denominator, by which results are merged
(arXiv 2310.01889). A rank has a head and a tail of each row (parallel/context.py): of the keys of an earlier rank both
see the head, of those of a later one the tail sees both; so every rank has as many blocks to do at every step. Blocks
of which the mask hides everything are left out, on each rank alone.

One operator forward and one backward, opaque to torch.compile, which traces no sends.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from parallel.comm import Lane
from parallel.ring_block import Seen, attend, attend_backward
from zoo.kernel import Kernel, render
from zoo.kernel_choice import KernelName
from zoo.kernel_max import largest
from zoo.mask import Mask
from zoo.section import Section


class Ring(Kernel):
    """Attends to keys and values that go round; not with sinks, a softcap or the temperature ``ratio``."""

    lane: Lane

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Section, *, sinks: Tensor | None = None) -> Tensor:
        """Attend, all of own tokens: (B, T/n, …) (n - 1 sends over cp; 2 n - 1 in the backward)."""
        assert isinstance(mask, Mask) and sinks is None, f"{mask=} {sinks=}"
        assert self.softcap is None and self.temperature is None, f"{self.softcap=} {self.temperature=}"
        name, rank, size = self.lane.group.group_name, self.lane.rank, self.lane.size
        table = mask.table(2 * size)
        measures = self.measures
        y, _, top = ring(q, k, v, mask.pieces, table, mask.window, self.scale, measures, name, rank, size)
        if measures:
            self.keep(top)
        return y

    def prepare(self, mask: Mask | Section) -> None:
        """Make what the kernel reads of a row's mask, which compiled code may not."""
        assert isinstance(mask, Mask), f"{mask=}"
        render(mask, KernelName.plain)
        mask.table(2 * self.lane.size)


@torch.library.custom_op("parallel::ring", mutates_args=())
def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Tensor | None,
    table: Tensor | None,
    window: int | None,
    scale: float,
    measures: bool,
    group: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend (n - 1 sends over the group).

    Args:
        q: (B, T/n, H, K), of this rank's tokens: its head and its tail.
        k: (B, T/n, G, K).
        v: (B, T/n, G, U).
        pieces: (B or 1, T), of ``Mask``.
        table: (2 n, 2 n), of ``Mask``.
        window: of ``Mask``.
        scale: of the scores.
        measures: whether the largest scores are wanted.
        group: name of the group of ranks.
        rank: this one's place.
        size: how many there are, n.

    Returns:
        (B, T/n, H, U); the logarithm of the denominators, (2, B, H, T/2n), of the head and the tail; and the largest
        score of each head of own queries, (H,), where it is wanted.
    """
    own = _Own(q, pieces, table, window, rank, size)
    queries, results = own.halves(q), _Merged()
    top = q.new_full((q.shape[2] if measures else 0,), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    ranks, kv = _Round(group, rank, size), torch.cat([k, v], dim=-1)
    for step in range(size):
        coming = ranks.send(kv) if step < size - 1 else None
        for half, other, causal, mask in own.blocks((rank - step) % size):
            keys, values = own.halves(kv)[other].split([k.shape[-1], v.shape[-1]], dim=-1)
            if measures:
                sight = Seen(keys.shape[2], causal, mask, q.device)
                top = torch.maximum(top, largest(queries[half], keys, sight, scale=scale))
            results.add(half, *attend(queries[half], keys, values, causal=causal, mask=mask, scale=scale))
        if coming is not None:
            kv = coming.wait()
    y = torch.cat([results.of[0][0], results.of[1][0]], dim=2).transpose(1, 2)
    return y.to(q.dtype).contiguous(), torch.stack([results.of[0][1], results.of[1][1]]), top


@torch.library.custom_op("parallel::ring_backward", mutates_args=())
def ring_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    denominators: Tensor,
    pieces: Tensor | None,
    table: Tensor | None,
    window: int | None,
    scale: float,
    group: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values (2 n - 1 sends over the group).

    Those of keys and values follow them round, a step behind, and so end at the rank that has them.
    """
    own = _Own(q, pieces, table, window, rank, size)
    queries, results, grads = own.halves(q), own.halves(y), own.halves(grad)
    wide = torch.promote_types(q.dtype, torch.float32)
    d_q, arriving = torch.zeros_like(q, dtype=wide), None
    ranks, kv = _Round(group, rank, size), torch.cat([k, v], dim=-1)
    for step in range(size):
        coming = ranks.send(kv) if step < size - 1 else None
        d_kv = torch.zeros_like(kv, dtype=wide)
        for half, other, causal, mask in own.blocks((rank - step) % size):
            keys, values = own.halves(kv)[other].split([k.shape[-1], v.shape[-1]], dim=-1)
            forward = queries[half], keys, values, results[half], denominators[half]
            pulls = attend_backward(grads[half], *forward, causal=causal, mask=mask, scale=scale)
            own.halves(d_q)[half].add_(pulls[0])
            own.halves(d_kv)[other].add_(torch.cat(pulls[1:], dim=-1))
        if arriving is not None:
            d_kv += arriving.wait()
        arriving = ranks.send(d_kv)
        if coming is not None:
            kv = coming.wait()
    assert arriving is not None, f"{size=}"
    d_k, d_v = arriving.wait().split([k.shape[-1], v.shape[-1]], dim=-1)
    return d_q.to(q.dtype), d_k.to(k.dtype).contiguous(), d_v.to(v.dtype).contiguous()


@dataclass
class _Own:
    """This rank's queries, and what they see."""

    q: Tensor
    pieces: Tensor | None
    table: Tensor | None
    window: int | None
    rank: int
    size: int

    def __post_init__(self) -> None:
        self.mask, self.length = None, self.q.shape[1] // 2
        if self.table is not None:  # pieces serve as documents: they are what sees itself alone
            columns = torch.arange(2 * self.size * self.length, device=self.q.device)[None]
            positions = columns if self.pieces is None else torch.zeros_like(self.pieces)
            self.mask = Mask(self.pieces, positions, self.window)
        self.told = None if self.table is None else self.table.tolist()

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the head and the tail, heads before tokens: (B, T/n, H, K) to two of (B, H, T/2n, K)."""
        head, tail = x.transpose(1, 2).chunk(2, dim=2)
        return head, tail

    def blocks(self, rank: int) -> list[tuple[int, int, bool, Tensor | None]]:
        """What is to be done with the keys of a rank: own half, its half, whether causal, and the mask if there is one.

        Example: of three ranks, 0 to 2, with chunks 0 5, 1 4 and 2 3: of rank 0's keys rank 1's head and tail see the
        head, as 1 and 4 are after 0; of rank 2's its tail sees both, as 4 is after 2 and 3.
        """
        found: list[tuple[int, int, bool, Tensor | None]] = []
        for half, mine in enumerate((self.rank, 2 * self.size - 1 - self.rank)):
            for other, theirs in enumerate((rank, 2 * self.size - 1 - rank)):
                told = 2 if self.told is None else self.told[mine][theirs]
                if mine < theirs or not told:
                    continue
                if told == 2:
                    found.append((half, other, mine == theirs, None))
                else:
                    assert self.mask is not None, f"{self.told=}"
                    queries, keys = (range(i * self.length, (i + 1) * self.length) for i in (mine, theirs))
                    found.append((half, other, False, self.mask.part(queries=queries, keys=keys)))
        return found


class _Merged:
    """Results of the head and the tail of own queries so far, each with the logarithm of its denominators."""

    def __init__(self) -> None:
        self.of: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, half: int, y: Tensor, denominator: Tensor) -> None:
        """Merge what more keys gave: results are averaged, with the parts of the common denominator as weights."""
        if half in self.of:
            before, previous = self.of[half]
            total = torch.logaddexp(previous, denominator)
            y = before * (previous - total).exp()[..., None] + y * (denominator - total).exp()[..., None]
            denominator = total
        self.of[half] = y, denominator


class _Round:
    """The ranks in a circle: what is sent goes to the next one and arrives from the one before."""

    def __init__(self, group: str, rank: int, size: int) -> None:
        self.group = _resolve_process_group(group)  # type: ignore[arg-type]
        self.next, self.previous = ((rank + step) % size for step in (1, -1))

    def send(self, x: Tensor) -> "_Coming":
        """Start to pass on (one send and one receive)."""
        x = x.contiguous()
        result = torch.empty_like(x)
        operations = [
            dist.P2POp(dist.isend, x, group=self.group, group_peer=self.next),
            dist.P2POp(dist.irecv, result, group=self.group, group_peer=self.previous),
        ]
        return _Coming(result, x, dist.batch_isend_irecv(operations))


@dataclass
class _Coming:
    """What is arriving, and what is being sent meanwhile, which must not be given up before it has gone."""

    result: Tensor
    sent: Tensor
    requests: list[dist.Work]

    def wait(self) -> Tensor:
        """What has arrived."""
        for request in self.requests:
            request.wait()
        return self.result


@ring.register_fake
def _ring_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Tensor | None,
    table: Tensor | None,
    window: int | None,
    scale: float,
    measures: bool,
    group: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    denominators, top = q.new_empty(2, B, H, T // 2, dtype=wide), q.new_empty(H if measures else 0, dtype=wide)
    return q.new_empty(B, T, H, v.shape[-1]), denominators, top


@ring_backward.register_fake
def _ring_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, denominators: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, pieces, table, window, scale, _, *ranks = inputs
    ctx.save_for_backward(q, k, v, *output[:2], pieces, table)
    ctx.settings = window, scale, *ranks


def _ring_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    found = ring_backward(grads[0], *ctx.saved_tensors, *ctx.settings)
    return *found, *(None,) * 8


ring.register_autograd(_ring_gradients, setup_context=_keep)
