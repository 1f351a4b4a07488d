"""Work that succeeds on all ranks or fails on all: no rank waits for one that has given up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from trainer.manifest import CheckpointError

Result = TypeVar("Result")

# How gloo, NCCL and the store of the rendezvous put it that the process at the other end is gone.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "recv, got 0 bytes")


@dataclass(frozen=True)
class Ranks:
    """All processes of a run; a ``world_size`` of 1 needs no process group.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        error: what all ranks raise when work fails, made of its message.
    """

    rank: int
    world_size: int
    error: type[Exception] = CheckpointError

    def gather(self, work: Callable[[], Result], *, doing: str) -> list[Result]:
        """Do the work on every rank (one all-gather over all ranks).

        Args:
            work: may raise ``OSError`` or ``self.error``; its result has to pickle.
            doing: what the work does, for the message of an ``OSError``: cannot ``doing``: No space left on device.

        Returns:
            Every rank's result, the same list on all ranks.

        Raises:
            Exception: ``self.error``, since the work failed somewhere; all ranks raise the lowest such rank's message.
        """
        mine: tuple[Result | None, str | None]
        try:
            mine = work(), None
        except self.error as error:
            mine = None, str(error)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            mine = None, f"cannot {doing}: {error.strerror or error}{where}"
        everyone = [mine] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, mine)
        for _, message in everyone:
            if message is not None:
                raise self.error(message)
        return [result for result, _ in everyone]  # type: ignore[misc]  # None only beside a message

    def each(self, work: Callable[[], Result], *, doing: str) -> Result:
        """As ``gather`` (one all-gather over all ranks), but the result is this rank's and need not pickle."""
        results: list[Result] = []
        self.gather(lambda: results.append(work()), doing=doing)
        return results[0]

    def first(self, work: Callable[[], Result], *, doing: str) -> Result:
        """Do the work on rank 0 and give all ranks its result (one all-gather over all ranks); errors as ``gather``."""
        result = self.gather(lambda: work() if self.rank == 0 else None, doing=doing)[0]
        return result  # type: ignore[return-value]  # rank 0 did the work


def lost(error: BaseException) -> bool:
    """Whether an error of a collective only tells that another process is gone, which knows why."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in GONE)
