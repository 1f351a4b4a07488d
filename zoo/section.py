"""A mask for some consecutive queries of each row and the keys within their reach."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.mask import Mask, tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass
class Section:
    """What a ``Mask`` says of some consecutive queries of each row, as kernels ask a mask, which they may take it for.

    Keys are counted from the first one that is within the reach of any of the queries, and end with the last query.

    Example: queries 3 … 4 of rows of six, with a window of 3, are given keys 1 … 4; ``dense`` is

        1 1 1 .
        . 1 1 1

    Attributes:
        mask: of whole rows.
        queries: columns of rows.
        keys: columns of rows, that end where queries do.
    """

    mask: Mask
    queries: range
    keys: range

    @property
    def positions(self) -> Tensor:
        """(B, queries), counted from the start of each document."""
        return self.mask.positions[:, self.queries.start : self.queries.stop]

    @property
    def pieces(self) -> Tensor | None:
        """Of whole rows (``Mask.pieces``)."""
        return self.mask.pieces

    @property
    def window(self) -> int | None:
        """Keys that a query sees at most."""
        return self.mask.window

    @property
    def is_causal(self) -> bool:
        """Whether nothing but the future is hidden and no key is before the first query."""
        return self.mask.is_causal and self.keys.start == self.queries.start

    @cached_property
    def dense(self) -> Tensor | None:
        """(B or 1, 1, queries, keys), true where a query may see a key; None: plain causal, as many of both."""
        return None if self.is_causal else self.mask.part(queries=self.queries, keys=self.keys)

    def reach(self, queries: range) -> range:
        """The keys that some of the queries may see, both counted from this section's first."""
        reached = self.mask.reach(_moved(queries, self.queries.start))
        return _moved(reached, -self.keys.start)

    def part(self, *, queries: range, keys: range) -> Tensor:
        """(B or 1, 1, queries, keys) of ``dense``, whether or not it is plain causal."""
        return self.mask.part(queries=_moved(queries, self.queries.start), keys=_moved(keys, self.keys.start))

    @cached_property
    def blocks(self) -> "BlockMask":
        """As flex attention wants it (``Mask.blocks``)."""
        allowed = self.mask.shifted(self.queries.start, self.keys.start)
        return tiles(self.mask, allowed, queries=len(self.queries), keys=len(self.keys))

    @cached_property
    def key_ends(self) -> Tensor:
        """(pieces of all rows + 1,) int32: where each starts in the keys laid end to end, then their number.

        Only of the pieces that have a key here; the host waits as in ``Mask.ends`` where there are documents.

        Example: in rows of pieces 0 0 1 1 1 and 0 0 0 0 1, queries 2 … 4 reach keys 0 … 4: 0 2 5 9 10.
        """
        mask, B = self.mask, self.mask.positions.shape[0]
        if mask.pieces is None:
            return torch.arange(B + 1, device=mask.positions.device, dtype=torch.int32) * len(self.keys)
        pieces = mask.pieces[:, self.keys.start : self.keys.stop].expand(B, -1)
        starting = torch.ones_like(pieces, dtype=torch.bool)
        starting[:, 1:] = pieces[:, 1:] != pieces[:, :-1]
        return F.pad(starting.flatten().nonzero()[:, 0].to(torch.int32), (0, 1), value=starting.numel())

    @cached_property
    def ends(self) -> Tensor:
        """(pieces of all rows + 1,) int32: where the queries of each start, laid end to end, then their number.

        Of a piece that has both, the queries are the last keys. One may have keys alone.

        Example: as in ``key_ends``, queries 2 … 4: 0 0 3 5 6; the first piece has none of them.
        """
        row, column = self.key_ends // len(self.keys), self.key_ends % len(self.keys)
        earlier = len(self.keys) - len(self.queries)
        return (row * len(self.queries) + (column - earlier).clamp(min=0)).to(torch.int32)

    @property
    def longest(self) -> int:
        """Queries of a piece at most, known without asking the device."""
        return min(len(self.queries), self.mask.longest)

    @property
    def key_longest(self) -> int:
        """Keys of a piece at most, known without asking the device."""
        return min(len(self.keys), self.mask.longest)


def _moved(columns: range, by: int) -> range:
    return range(columns.start + by, columns.stop + by)


def section(mask: Mask, queries: range) -> Section:
    """What a mask says of some consecutive queries of each row, made once."""
    key = queries.start, queries.stop
    if key not in mask.sections:
        bare = replace(mask, sections={}, tables={})  # a mask that is held by what it holds would outlive its forward
        mask.sections[key] = Section(bare, queries, mask.reach(queries))
    return mask.sections[key]
