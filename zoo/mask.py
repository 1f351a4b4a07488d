"""Who may attend to whom, as data; each kernel renders it in its own way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from zoo.section import Section


@dataclass
class Mask:
    """Causal attention that stays within documents, and within a window or a chunk of them.

    Attributes:
        documents: (B, T), a number that differs between neighbouring documents of a row; None: each row is one.
        positions: (B, T), counted from the start of each document.
        window: keys that a query sees at most, its own included; None: all before it.
        chunk: tokens of a document that see each other: 0 … chunk − 1, chunk … 2 chunk − 1, …; None: all.
        sections: made of it by ``zoo.section``, by first and last query.
        tables: made by ``table``, by their size.
    """

    documents: Tensor | None
    positions: Tensor
    window: int | None = None
    chunk: int | None = None
    sections: dict[tuple[int, int], "Section"] = field(default_factory=dict, repr=False, compare=False)
    tables: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        length = self.positions.shape[1]
        if self.window is not None and self.window >= length:
            self.window = None
        if self.chunk is not None and self.chunk >= length:
            self.chunk = None  # no position of a row reaches it

    @property
    def is_causal(self) -> bool:
        """Whether nothing but the future is hidden, as kernels know it without a mask."""
        return self.documents is None and self.window is None and self.chunk is None

    @cached_property
    def pieces(self) -> Tensor | None:
        """(B or 1, T), a number that differs between what does not see each other but for a window; None: all one.

        Example, chunk 2: documents 0 0 0 1 1 1 with positions 0 1 2 0 1 2 are pieces 0 0 1 2 2 3.
        """
        if self.documents is None and self.chunk is None:
            return None
        starts = torch.zeros_like(self.positions[:1] if self.documents is None else self.positions, dtype=torch.bool)
        if self.documents is not None:
            starts[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        if self.chunk is not None:  # a row that is one document is counted from its first token
            columns = torch.arange(starts.shape[1], device=starts.device)
            starts |= (columns if self.documents is None else self.positions) % self.chunk == 0
            starts[:, 0] = False
        return starts.cumsum(dim=1, dtype=torch.int32)

    @cached_property
    def dense(self) -> Tensor | None:
        """(B or 1, 1, T, T), true where a query (row) may see a key (column); None: plain causal.

        Example: documents 0 0 1 1 1, without a window and with a window of 2, allow

            1 . . . .        1 . . . .
            1 1 . . .        1 1 . . .
            . . 1 . .        . . 1 . .
            . . 1 1 .        . . 1 1 .
            . . 1 1 1        . . . 1 1
        """
        length = self.positions.shape[1]
        return None if self.is_causal else self.part(queries=range(length), keys=range(length))

    def reach(self, queries: range) -> range:
        """The keys that some of these consecutive queries may see, as far as it shows without looking at documents.

        Example: queries 4 … 5 see keys 0 … 5, with a window of 3 keys 2 … 5.
        """
        first = 0
        if self.window is not None:
            first = max(0, queries.start - self.window + 1)
        elif self.chunk is not None and self.documents is None:
            first = queries.start // self.chunk * self.chunk
        return range(first, queries.stop)

    def part(self, *, queries: range, keys: range) -> Tensor:
        """(B or 1, 1, queries, keys) of ``dense``, whether or not it is plain causal."""
        row = torch.arange(queries.start, queries.stop, device=self.positions.device)[:, None]
        column = torch.arange(keys.start, keys.stop, device=self.positions.device)
        allowed = (column <= row)[None]
        if self.window is not None:
            allowed = allowed & (column > row - self.window)
        if self.pieces is not None:
            here, there = self.pieces[:, queries.start : queries.stop], self.pieces[:, keys.start : keys.stop]
            allowed = allowed & (here[:, :, None] == there[:, None, :])
        return allowed[:, None]

    def table(self, runs: int) -> Tensor | None:
        """What queries of each of some equal runs of columns see of keys of each, made once; None: plain causal.

        The host waits for it. It is of all rows together, where there are documents.

        Example: documents 0 0 0 0 1 1 in three runs, of which the last sees nothing of the others, and in two:

            2 . .      2 .
            2 2 .      1 1
            . . 2

        Returns:
            (runs, runs) uint8 on the host: 0 nothing, 1 some, 2 everything that is not in the future.
        """
        if self.is_causal:
            return None
        if runs not in self.tables:
            size = self.positions.shape[1] // runs
            first = torch.arange(0, runs * size, size, device=self.positions.device)
            last = first + size - 1
            some = first[:, None] >= first
            every = some
            if self.window is not None:
                some = some & (first[:, None] - last < self.window)
                every = every & (last[:, None] - first < self.window)
            if self.pieces is not None:  # numbered in order: between two of one piece there is no other
                start, end = self.pieces[:, first], self.pieces[:, last]
                near = (start[:, :, None] == end[:, None]) | torch.eye(runs, dtype=torch.bool, device=first.device)
                some = some & near.any(0)
                every = every & (end[:, :, None] == start[:, None]).all(0)
            self.tables[runs] = (some.to(torch.uint8) + (some & every).to(torch.uint8)).cpu()
        return self.tables[runs]

    @property
    def predicate(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """``dense`` as a function of scalar tensors row of the batch, head, query and key, for flex attention."""
        return self.shifted(0, 0)

    def shifted(self, first_query: int, first_key: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """``predicate`` of queries and keys that are counted from these."""
        pieces, window = self.pieces, self.window

        def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query, key = query + first_query, key + first_key
            sees = key <= query
            if window is not None:
                sees = sees & (query - key < window)
            if pieces is not None:
                row = b if pieces.shape[0] > 1 else 0
                sees = sees & (pieces[row, query] == pieces[row, key])
            return sees

        return allowed

    @cached_property
    def ends(self) -> Tensor:
        """(pieces of all rows + 1,) int32: where each starts in the batch laid end to end, then its length.

        Example: rows of pieces 0 0 1 and 0 1 1 give 0 2 3 4 6. How many there are is known to the device alone, which
        the host here waits for, once a forward; without documents it knows.
        """
        B, T = self.positions.shape
        if self.pieces is None:
            return torch.arange(0, B * T + 1, T, device=self.positions.device, dtype=torch.int32)
        if self.documents is None:
            assert self.chunk is not None, f"{self=}"
            rows = torch.arange(0, B * T, T, device=self.positions.device, dtype=torch.int32)
            starts = rows[:, None] + torch.arange(0, T, self.chunk, device=rows.device, dtype=torch.int32)
            return F.pad(starts.flatten(), (0, 1), value=B * T)
        starting = torch.ones_like(self.pieces, dtype=torch.bool)
        starting[:, 1:] = self.pieces[:, 1:] != self.pieces[:, :-1]
        return F.pad(starting.flatten().nonzero()[:, 0].to(torch.int32), (0, 1), value=B * T)

    @property
    def key_ends(self) -> Tensor:
        """``ends`` of the keys, which are those of the queries."""
        return self.ends

    @cached_property
    def blocks(self) -> "BlockMask":
        """As flex attention wants it: which tiles of ``dense`` are empty, full or mixed, made without holding it."""
        length = self.positions.shape[1]
        return tiles(self, self.predicate, queries=length, keys=length)

    @property
    def longest(self) -> int:
        """Tokens that no piece exceeds, known without asking the device."""
        length = self.positions.shape[1]
        return length if self.chunk is None else self.chunk

    @property
    def key_longest(self) -> int:
        """``longest`` of the keys, which is that of the queries."""
        return self.longest


def tiles(
    mask: Mask, allowed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, queries: int, keys: int
) -> "BlockMask":
    """Which tiles of what ``allowed`` says are empty, full or mixed."""
    from torch.nn.attention.flex_attention import create_block_mask  # 0.4 s, for this kernel only

    rows = None if mask.pieces is None or mask.pieces.shape[0] == 1 else mask.pieces.shape[0]
    device = mask.positions.device
    # Eager, it holds the dense mask for a moment; compiled, a tile.
    return create_block_mask(allowed, rows, None, queries, keys, device=device, _compile=device.type == "cuda")
