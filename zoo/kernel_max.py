"""The largest attention logit of each head, by a pass of its own: for kernels that do not tell it.

A logit here is what ``tau`` of QK-Clip is about (arXiv 2507.20534, section 2.1): a scaled product of a query and a key
that it sees, before what softcap and temperature make of it, which scaling of weights does not pass through.
"""

from typing import Protocol

import torch
from torch import Tensor

from zoo.linear import product_dtype
from zoo.mask import Mask
from zoo.section import Section

NUMBERS = {"cpu": 2**20, "cuda": 2**26}
"""Logits held at once, for all rows and heads of a part of the queries, by kind of device.

4 MiB in fp32 on a CPU, as ``zoo.kernel_plain.SCORES``; 256 MiB on a GPU, which wants large products.
"""


class Sight(Protocol):
    """Which keys queries see, as ``Mask`` and ``Section`` say it."""

    def reach(self, queries: range) -> range:
        """The keys that some of these queries may see."""

    def part(self, *, queries: range, keys: range) -> Tensor:
        """(B or 1, 1, queries, keys), true where a query sees a key."""


def measured(q: Tensor, k: Tensor, mask: Mask | Section, *, scale: float) -> Tensor:
    """Largest logit of each head, one operator to all that trace or compile: (B, T, H, K), (B, S, G, K) to (H,)."""
    first_query, first_key = (mask.queries.start, mask.keys.start) if isinstance(mask, Section) else (0, 0)
    result: Tensor = measure(q.detach(), k.detach(), mask.pieces, mask.window, first_query, first_key, scale)
    return result


@torch.library.custom_op("zoo::largest_logits", mutates_args=())
def measure(
    q: Tensor, k: Tensor, pieces: Tensor | None, window: int | None, first_query: int, first_key: int, scale: float
) -> Tensor:
    """Largest logit of each head.

    Args:
        q: (B, T, H, K), of consecutive columns of rows.
        k: (B, S, G, K), likewise; the last one is of the last query's column.
        pieces: of ``Mask``, of whole rows.
        window: of ``Mask``.
        first_query: column of the first query.
        first_key: column of the first key.
        scale: of the logits.

    Returns:
        (H,), of at least fp32.
    """
    queries, keys = (range(first, first + x.shape[1]) for first, x in ((first_query, q), (first_key, k)))
    columns = torch.arange(queries.stop, device=q.device)[None]
    # Pieces serve as documents: they are what sees itself alone.
    mask = Mask(pieces, columns if pieces is None else torch.zeros_like(pieces), window)
    sight = mask if queries == keys else Section(mask, queries, keys)
    return largest(q.transpose(1, 2), k.transpose(1, 2), sight, scale=scale)


@measure.register_fake
def _measure_fake(q: Tensor, k: Tensor, *settings: object) -> Tensor:
    return q.new_empty(q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.no_grad()
def largest(q: Tensor, k: Tensor, sight: Sight, *, scale: float) -> Tensor:
    """Largest logit of each head, minus infinity where no query sees a key: (B, H, T, K), (B, G, S, K) to (H,)."""
    B, H, T, _ = q.shape
    G = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    top = torch.full((G, H // G), -torch.inf, dtype=wide, device=q.device)
    step = max(1, min(T, NUMBERS[q.device.type] // (B * H * k.shape[2])))
    for first in range(0, T, step):
        queries = range(first, min(first + step, T))
        reach = sight.reach(queries)
        keys = range(max(0, reach.start), reach.stop)  # of a section's chunks, keys that are not here are not seen
        here = q[:, :, first : queries.stop].unflatten(1, (G, -1))  # (B, G, H/G, t, K)
        logits = _products(here.flatten(2, 3), k[:, :, keys.start : keys.stop]).unflatten(2, (H // G, -1))
        hidden = ~sight.part(queries=queries, keys=keys)[:, :, None]
        found = logits.mul_(scale).masked_fill_(hidden, -torch.inf).amax(dim=(0, 3, 4))
        torch.maximum(top, found, out=top)
    return top.flatten()


def _products(q: Tensor, k: Tensor) -> Tensor:
    """(B, G, M, K) times (B, G, N, K) to (B, G, M, N) in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.device.type == "cuda" and q.dtype is not wide:  # never run: written against the operator's signature
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=wide)
        return flat.unflatten(0, k.shape[:2])
    narrow = product_dtype(q.dtype, q.device.type)
    return (q.to(narrow) @ k.to(narrow).mT).to(wide)
