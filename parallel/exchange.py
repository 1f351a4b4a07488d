"""Whole matrices at their owners: one all-to-all there and one back for each round of ``parallel/owners.py``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm import Lane
from parallel.owners import Piece, Task


@dataclass(frozen=True)
class Stack:
    """Matrices of one size that this rank owns.

    Attributes:
        tasks: their numbers in the round.
        matrices: (N, n, m).
    """

    tasks: list[int]
    matrices: Tensor


class Round:
    """What this rank gives and takes for some matrices.

    Of a matrix of n x m numbers the owner takes in what is not its own, and sends as much back to each copy of the
    model's layers: over R ranks that share it evenly 2 n m (R − 1) / R numbers travel, and n m more for every further
    copy. Nothing travels of a matrix that only its owner has, as an expert's where nothing but ep shares it.
    """

    def __init__(self, tasks: Sequence[Task], *, lane: Lane | None, dtype: torch.dtype, device: torch.device) -> None:
        """Sort the pieces by where they go.

        Args:
            tasks: of the round, the same list on every rank.
            lane: the ranks that their numbers mean; None: this one alone.
            dtype: to send, and to work in.
            device: that the ranks communicate from.
        """
        self.tasks, self.lane, self.dtype, self.device = tasks, lane, dtype, device
        me, n = (lane.rank, lane.size) if lane is not None else (0, 1)
        self._given: list[list[tuple[int, Piece]]] = [[] for _ in range(n)]  # to each owner
        self._taken: list[list[tuple[int, Piece]]] = [[] for _ in range(n)]  # from each sender, as an owner
        self._sent: list[list[tuple[int, Piece]]] = [[] for _ in range(n)]  # to each holder, as an owner
        self._got: list[list[tuple[int, Piece]]] = [[] for _ in range(n)]  # from each owner
        for number, task in enumerate(tasks):
            if me in task.senders:
                self._given[task.owner].append((number, task.senders[me]))
            if me in task.holders:
                self._got[task.owner].append((number, task.holders[me]))
            if me == task.owner:
                for rank, piece in task.senders.items():
                    self._taken[rank].append((number, piece))
                for rank, piece in task.holders.items():
                    self._sent[rank].append((number, piece))
        self._stacks: dict[tuple[int, int], list[int]] = {}
        for number, task in enumerate(tasks):
            if me == task.owner:
                self._stacks.setdefault(task.matrix.size, []).append(number)

    def gather(self, part: Callable[[int], Tensor]) -> list[Stack]:
        """Bring matrices to their owners (one all-to-all over dp_replicate, dp_shard, cp and tp).

        Args:
            part: this rank's piece of a task, by its number.

        Returns:
            What this rank owns, matrices of one size together.
        """
        given = [part(number).to(self.dtype).flatten() for each in self._given for number, _ in each]
        pieces = self._exchanged(given, self._given, self._taken)
        stacks: list[Stack] = []
        places: dict[int, Tensor] = {}
        for size, numbers in self._stacks.items():
            stacks.append(Stack(numbers, self._empty(len(numbers), *size)))
            places |= {number: stacks[-1].matrices[i] for i, number in enumerate(numbers)}
        for number, piece, x in pieces:
            places[number][piece.top : piece.bottom, piece.left : piece.right] = x
        return stacks

    def scatter(self, stacks: Sequence[Stack]) -> dict[int, Tensor]:
        """Give every rank its pieces of what owners have made (one all-to-all over dp_replicate, dp_shard, cp and tp).

        Args:
            stacks: as ``gather`` gave them, with other matrices.

        Returns:
            This rank's pieces by the numbers of tasks.
        """
        made: Mapping[int, Tensor] = {
            number: matrix for stack in stacks for number, matrix in zip(stack.tasks, stack.matrices, strict=True)
        }
        sent = [
            made[number][piece.top : piece.bottom, piece.left : piece.right].flatten()
            for each in self._sent
            for number, piece in each
        ]
        return {number: x for number, _, x in self._exchanged(sent, self._sent, self._got)}

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _exchanged(
        self, pieces: list[Tensor], out: Sequence[list[tuple[int, Piece]]], back: Sequence[list[tuple[int, Piece]]]
    ) -> list[tuple[int, Piece, Tensor]]:
        """Pieces that come in for those that go out (one all-to-all over dp_replicate, dp_shard, cp and tp)."""
        came = flat = torch.cat(pieces).to(self.device) if pieces else self._empty(0)
        if self.lane is not None:
            goes, comes = ([sum(piece.numel for _, piece in each) for each in way] for way in (out, back))
            came = self._empty(sum(comes))
            dist.all_to_all_single(came, flat, comes, goes, group=self.lane.group)
        expected = [entry for each in back for entry in each]
        parts = came.split([piece.numel for _, piece in expected]) if expected else ()
        return [(number, piece, x.view(piece.shape)) for (number, piece), x in zip(expected, parts, strict=True)]
