"""Mixers of a rank that has some tokens of each row (parallel/context.py): three ways to see those of other ranks.

``gather`` brings keys and values of all tokens to every rank; ``ulysses`` all tokens of some heads to every rank, and
back (arXiv 2309.14509, section 3); ``ring`` passes keys and values round, a rank's at a time (parallel/ring.py).

A class here is a model's own with collectives around what it does; parameters keep their names. What several ranks
have of a gradient are parts of a sum, of a parameter that is used in slices too.
"""

import torch
from torch import Tensor

from parallel.comm import Lane
from parallel.config import ContextMethod
from parallel.context import gather_rows, stretches, to_own, to_rows
from parallel.context_delta import RowDeltaNet
from parallel.ring import Ring
from parallel.tensor import become
from zoo.attention import Attention
from zoo.context import Context
from zoo.decoder import Decoder
from zoo.deltanet import DeltaNet
from zoo.kernel import Kernel
from zoo.mask import Mask
from zoo.mla import MLA
from zoo.section import Section, section


class OwnQueries(Kernel):
    """Own queries attend to whole rows: the head and the tail, each to keys up to its end; no communication."""

    lane: Lane

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Section, *, sinks: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: (B, T/n, H, K), of this rank's tokens.
            k: (B, T, G, K), of whole rows.
            v: (B, T, G, U), of whole rows.
            mask: of whole rows.
            sinks: (H,).

        Returns:
            (B, T/n, H, U).
        """
        results = []
        for part, queries in zip(self._sections(mask), q.chunk(2, dim=1), strict=True):
            first, end = part.keys.start, part.keys.stop
            results.append(super().forward(queries, k[:, first:end], v[:, first:end], part, sinks=sinks))
        return torch.cat(results, dim=1)

    def prepare(self, mask: Mask | Section) -> None:
        """Make what the kernel reads of a row's mask, which compiled code may not."""
        for part in self._sections(mask):
            super().prepare(part)

    def _sections(self, mask: Mask | Section) -> tuple[Section, Section]:
        assert isinstance(mask, Mask), f"{mask=}"
        head, tail = stretches(self.lane, mask.positions.shape[1])
        return section(mask, head), section(mask, tail)


class Gathering(OwnQueries):
    """As ``OwnQueries``, after keys and values were gathered."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Section, *, sinks: Tensor | None = None) -> Tensor:
        """Attend, all of own tokens: (B, T/n, …) (one all-gather over cp; backward one reduce-scatter)."""
        rows = gather_rows(torch.cat([k, v], dim=-1), self.lane)  # (B, T, G, K+U)
        k, v = rows.split([k.shape[-1], v.shape[-1]], dim=-1)
        return super().forward(q, k, v, mask, sinks=sinks)


class GatheringMLA(MLA):
    """Gathers latents, C + R numbers a token instead of H (N + R + U), and unfolds those of whole rows.

    For DeepSeek-V3 576 instead of 40,960; each rank makes keys and values of all tokens from them. Its kernel is
    ``OwnQueries``.
    """

    lane: Lane

    def _latent(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Of whole rows: (B, T, C), (B, T, R) (one all-gather over cp; backward one reduce-scatter)."""
        latent, k_rope = super()._latent(x, context)
        rows = gather_rows(torch.cat([latent, k_rope], dim=-1), self.lane)
        latent, k_rope = rows.split([latent.shape[-1], k_rope.shape[-1]], dim=-1)
        return latent, k_rope


class ByHeads(Kernel):
    """Attends to whole rows in some heads: rank r has the r-th of n equal runs of query heads, and their keys.

    Fewer key heads than ranks are sent to all ranks that need them.
    """

    lane: Lane

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Section, *, sinks: Tensor | None = None) -> Tensor:
        """Attend, all of own tokens: (B, T/n, …) (two all-to-alls over cp, and two in the backward)."""
        n = self.lane.size
        k, v = (_for_each(each, n) for each in (k, v))
        parts = [each.unflatten(2, (n, -1)).flatten(3) for each in (q, k, v)]  # (B, T/n, n, heads/n · width)
        rows = to_rows(torch.cat(parts, dim=-1), self.lane).split([part.shape[-1] for part in parts], dim=-1)
        q, k, v = (row.unflatten(-1, (-1, each.shape[-1])) for row, each in zip(rows, (q, k, v), strict=True))
        if sinks is not None:
            sinks = sinks.chunk(n)[self.lane.rank]
        y = super().forward(q, k, v, mask, sinks=sinks)  # (B, T, H/n, U)
        return to_own(y.flatten(2), self.lane).unflatten(-1, (-1, y.shape[-1])).flatten(2, 3)  # (B, T/n, H, U)


def share_rows(model: Decoder, lane: Lane, method: ContextMethod) -> None:
    """Give a model's mixers the classes that see tokens of other ranks, in place; after tp has cut them.

    Args:
        model: the whole, or a stage.
        lane: the ranks of cp.
        method: how attention sees them. The delta rule is shared by heads under every one.
    """
    kernels = {ContextMethod.gather: Gathering, ContextMethod.ulysses: ByHeads, ContextMethod.ring: Ring}
    for module in list(model.modules()):
        if isinstance(module, DeltaNet):
            become(module, RowDeltaNet, lane=lane)
        elif isinstance(module, MLA) and method is ContextMethod.gather:
            become(module, GatheringMLA, lane=lane)
            become(module.kernel, OwnQueries, lane=lane)
        elif isinstance(module, Attention | MLA):
            become(module.kernel, kernels[method], lane=lane)


def own_heads(kernel: Kernel, *, n_heads: int, tp: Lane | None) -> range:
    """Which of a layer's query heads a kernel attends with on this rank; no communication.

    Example: of 8 heads, tp 2 x cp 2 under ``ulysses``: the second rank of tp has 4 … 7, of which its first of cp 4 … 5.

    Args:
        kernel: after layers and rows were shared.
        n_heads: of the layer.
        tp: the ranks that share layers.
    """
    first, lanes = 0, [tp, kernel.lane if isinstance(kernel, ByHeads) else None]
    for lane in lanes:
        if lane is not None:
            n_heads //= lane.size
            first += lane.rank * n_heads
    return range(first, first + n_heads)


def _for_each(x: Tensor, size: int) -> Tensor:
    """Heads (B, T, G, K) that ``size`` ranks can share: fewer than these are repeated.

    Example: heads a b for four ranks are a a b b.
    """
    return x if x.shape[2] % size == 0 else x.repeat_interleave(size // x.shape[2], dim=2)
