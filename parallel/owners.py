"""Who brings together which matrix: pieces, owners and rounds, as data made without processes.

A parameter holds one matrix, or several: each expert of a bank, each part of a fused projection. The ranks of a stage
hold boxes of the parameter, and so pieces of its matrices. One of them, the owner, gets all pieces of a matrix, works
on the whole, and gives every rank its piece back (``parallel/exchange.py``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace
from math import prod

from torch.distributed.tensor import Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

Box = tuple[tuple[int, int], ...]
"""Where a part of a tensor begins and ends, in each dimension."""

LIMIT = 2**26
"""Numbers that an owner gathers in one round: 128 MiB in bf16."""


@dataclass(frozen=True)
class Matrix:
    """A matrix inside a parameter: all rows of it, or some of each of its heads.

    Example: keys and values of heads in turn, k k v k k v: the keys have period 3, first 0 and width 2; row 2 of their
    matrix is row 3 of the parameter.

    Attributes:
        name: of the parameter.
        shape: of the parameter: (rows, columns), or (experts, rows, columns).
        expert: which of a bank; None where the parameter is none.
        period: rows of a head; all rows where there are no heads.
        first: of its rows in each head.
        width: how many of them.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None
    period: int
    first: int
    width: int

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.shape[-2] // self.period * self.width, self.shape[-1]

    @property
    def cost(self) -> int:
        """Multiplications of one step of Newton-Schulz, whose three products have the shorter side twice at least."""
        short, long = min(self.size), max(self.size)
        return short * short * (2 * long + short)

    def below(self, row: int) -> int:
        """How many of its rows come before a row of the parameter."""
        heads, rest = divmod(row, self.period)
        return heads * self.width + min(max(rest - self.first, 0), self.width)

    def piece(self, box: Box) -> "Piece | None":
        """What of it lies in a box of the parameter; None: nothing."""
        if self.expert is not None and not box[0][0] <= self.expert < box[0][1]:
            return None
        (start, stop), (left, right) = box[-2:]
        rows = self.below(start), self.below(stop)
        return Piece(*rows, left, right) if rows[0] < rows[1] and left < right else None

    def rows(self, box: Box) -> list[int] | None:
        """Which rows of a box are its, counted from the box's first; None: all."""
        if self.width == self.period:
            return None
        start, stop = box[-2]
        numbers = range(self.below(start), self.below(stop))
        return [i // self.width * self.period + self.first + i % self.width - start for i in numbers]


@dataclass(frozen=True)
class Piece:
    """A part of a matrix: rows from ``top`` up to ``bottom``, columns from ``left`` up to ``right``."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def numel(self) -> int:
        """How many numbers."""
        return prod(self.shape)


@dataclass(frozen=True)
class Task:
    """One matrix that is to be worked on as a whole.

    Attributes:
        matrix: which.
        owner: rank that does it.
        senders: who gives the owner which piece: each number of the matrix once.
        holders: every rank that has a piece, copies too.
    """

    matrix: Matrix
    owner: int
    senders: dict[int, Piece]
    holders: dict[int, Piece]


def boxes(shape: Sequence[int], *, axes: Sequence[int], placements: Sequence[Placement]) -> list[Box]:
    """What each rank of a grid has of a tensor, ranks in the grid's order.

    What is cut twice along a dimension is cut by the plan first, and FSDP cuts each piece: torch calls the latter
    strided. Every cut is that of torch.chunk.

    Example: 5 rows over fsdp 2 (strided) x tp 2: tp makes 0:3 and 3:5, fsdp of them 0:2 2:3 and 3:4 4:5.

    Args:
        shape: of the whole tensor.
        axes: sizes of the grid.
        placements: one an axis.
    """
    order = sorted(range(len(axes)), key=lambda axis: isinstance(placements[axis], _StridedShard))
    found = []
    for rank in range(prod(axes)):
        box = [(0, n) for n in shape]
        for axis in order:
            placement = placements[axis]
            if isinstance(placement, Shard | _StridedShard):
                place = rank // prod(axes[axis + 1 :]) % axes[axis]
                box[placement.dim] = _chunk(*box[placement.dim], place=place, n=axes[axis])
        found.append(tuple(box))
    return found


def _chunk(start: int, stop: int, *, place: int, n: int) -> tuple[int, int]:
    size = -(-(stop - start) // n)
    first = min(start + place * size, stop)
    return first, min(first + size, stop)


def tasks(matrices: Sequence[tuple[Matrix, Sequence[Box]]], *, ranks: int, copies: int = 1) -> list[list[Task]]:
    """Rounds of matrices with their owners; what they cost is spread evenly over the ranks.

    An owner has at most ``LIMIT`` numbers in a round, or one matrix. The dearest come first, for each owner as many, so
    that what a round costs is even too.

    Args:
        matrices: each with what every rank has of its parameter.
        ranks: how many.
        copies: of the layers, by dp_replicate: blocks of ranks one after another, of which each has everything.
    """
    held = _held(matrices)
    costs = [matrix.cost for matrix, _ in matrices]
    chosen = owners(costs, held, ranks=ranks)
    rounds: list[list[Task]] = [[]]
    last, numbers = [0] * ranks, [0] * ranks  # of each owner: its round so far, and how many numbers it has there
    for i in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        matrix, owner = matrices[i][0], chosen[i]
        if numbers[owner] and numbers[owner] + prod(matrix.size) > LIMIT:
            last[owner], numbers[owner] = last[owner] + 1, 0
            if last[owner] == len(rounds):
                rounds.append([])
        numbers[owner] += prod(matrix.size)
        senders = _senders(held[i], owner, block=ranks // copies, ranks=ranks)
        rounds[last[owner]].append(Task(matrix, owner, senders, held[i]))
    return rounds


def _held(matrices: Sequence[tuple[Matrix, Sequence[Box]]]) -> list[dict[int, Piece]]:
    """Which ranks have which piece of each matrix.

    Of an expert only those are asked that have some of it: of 2,048 ranks and 45,000 experts that makes the difference
    between seconds and minutes.
    """
    having: dict[int, dict[int, list[int]]] = {}  # of boxes of a bank, by identity: ranks by expert
    found = []
    for matrix, of in matrices:
        ranks: Iterable[int] = range(len(of))
        if matrix.expert is not None:
            if id(of) not in having:
                having[id(of)] = {}
                for rank, box in enumerate(of):
                    for expert in range(*box[0]):
                        having[id(of)].setdefault(expert, []).append(rank)
            ranks = having[id(of)][matrix.expert]
        found.append({rank: piece for rank in ranks if (piece := matrix.piece(of[rank])) is not None})
    return found


def owners(costs: Sequence[int], held: Sequence[dict[int, Piece]], *, ranks: int) -> list[int]:
    """One rank for each matrix: the dearest first, each to who has most of it and is not full, else to the idlest.

    Full is who would have more than an even share, or than one matrix. So no rank has more than the even share and the
    dearest matrix together. What ranks have whole comes before all that is cut, which then evens the work out: experts
    stay where they are under expert parallelism.
    """
    if not costs:
        return []
    even = max(sum(costs) / ranks, max(costs))
    load, chosen = [0] * ranks, [0] * len(costs)
    idlest = [(0, rank) for rank in range(ranks)]  # a heap; what a rank has taken since is made up for at the top
    cut = [len(set(pieces.values())) > 1 for pieces in held]
    for i in sorted(range(len(costs)), key=lambda i: (cut[i], -costs[i])):
        most = max(piece.numel for piece in held[i].values())
        near = [r for r, piece in held[i].items() if piece.numel == most and load[r] + costs[i] <= even]
        while idlest[0][0] < load[idlest[0][1]]:
            heapreplace(idlest, (load[idlest[0][1]], idlest[0][1]))
        owner = min(near, key=lambda r: (load[r], r)) if near else idlest[0][1]
        load[owner] += costs[i]
        chosen[i] = owner
    return chosen


def _senders(held: dict[int, Piece], owner: int, *, block: int, ranks: int) -> dict[int, Piece]:
    """Of each piece one holder: the owner, or the next one in the owner's copy of the layers."""
    nearest: dict[Piece, int] = {}
    for rank in sorted(held, key=lambda rank: (rank // block != owner // block, (rank - owner) % ranks)):
        nearest.setdefault(held[rank], rank)
    return {rank: piece for piece, rank in sorted(nearest.items(), key=lambda item: item[1])}
