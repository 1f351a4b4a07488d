"""Micro-batches of one rank: global batch i is a function of (seed, i) alone, whoever reads it and since when."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.batch import Batch, assemble
from data.config import DataConfig, Kind
from data.errors import DataError
from data.manifest import SPLITS, read_manifest
from data.ramp import Cuts
from data.source import ShardSource
from data.synthetic import SyntheticSource


@dataclass(frozen=True)
class _Slice:
    """Rows of a global batch that one rank reads, ``micro_batch`` at a time."""

    rank: int
    world_size: int
    micro_batch: int

    def share(self, size: int) -> int:
        """Of a batch of ``size`` rows, how many."""
        return size // self.world_size


class Loader:
    """Endless iterator over the micro-batches of one rank.

    Global batch i holds rows i·g … i·g + g - 1 of the endless sequence of epochs; rank r of w reads rows
    r·g/w … (r+1)·g/w - 1 of it. Example, g = 4, w = 2, micro_batch 1: rank 1 reads rows 2, 3, then 6, 7, then 10, 11.
    Where the first batches have other sizes, ``data.ramp.Cuts`` says where a batch begins; g is then the batch's own.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        global_batch: int,
        micro_batch: int,
        seq_len: int,
        n_mtp: int = 0,
        split: str = "train",
        start: int = 0,
        ramp: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Open the data; start with global batch ``start``.

        Args:
            config: what to read.
            seed: of the order, and of synthetic tokens.
            rank: of this process among those that read different rows.
            world_size: how many of those there are.
            global_batch: rows of one update, all ranks together.
            micro_batch: rows of one forward.
            seq_len: tokens of a row.
            n_mtp: depths of multi-token prediction.
            split: train or validation, which is read in order.
            start: number of the first global batch.
            ramp: (batches, rows of each) of the first batches, where they have other sizes than ``global_batch``.

        Raises:
            DataError: The data is not whole or too small, or the batch cannot be divided.
        """
        if split not in SPLITS:
            raise DataError(f"split={split}: must be one of {', '.join(SPLITS)}")
        if seq_len < 1:
            raise DataError(f"train.seq_len={seq_len}: must be 1 or more")
        for rows in (global_batch, *(rows for _, rows in ramp)):
            if micro_batch < 1 or rows < 1 or rows % (world_size * micro_batch):
                raise DataError(
                    f"train.global_batch={rows}: must be a multiple of ranks × micro_batch "
                    f"({world_size} × {micro_batch})"
                )
        self._cuts = Cuts(global_batch, tuple(ramp))
        self._slice = _Slice(rank=rank, world_size=world_size, micro_batch=micro_batch)
        self._n_mtp = n_mtp
        self._order: dict[str, Any] = {"seed": seed, "train.global_batch": global_batch, "train.seq_len": seq_len}
        self._order |= {"data": fingerprint(config, split=split)}
        if ramp:
            self._order["schedule.batch"] = [list(stage) for stage in ramp]
        self._source = _open(config, split=split, seq_len=seq_len, n_lookahead=1 + n_mtp, seed=seed)
        self._batch = start
        self._read = 0  # rows of the current global batch that this rank has handed out

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next micro-batch of this rank.

        Raises:
            DataError: A block of a shard is damaged.
        """
        mine = self._slice.share(self._cuts.size(self._batch))
        first = self._cuts.first(self._batch) + self._slice.rank * mine + self._read
        batch = self._rows(first, count=self._slice.micro_batch)
        self._read += self._slice.micro_batch
        if self._read == mine:
            self._batch, self._read = self._batch + 1, 0
        return batch

    @property
    def n_rows(self) -> int | None:
        """Rows in one pass over the split; null where it is endless."""
        return self._source.n_windows if isinstance(self._source, ShardSource) else None

    def rows(self, number: int) -> Batch:
        """The whole global batch ``number``, the rows of all ranks; the iterator stays where it is."""
        return self._rows(self._cuts.first(number), count=self._cuts.size(number))

    def state_dict(self) -> dict[str, Any]:
        """Number of the next whole global batch, and all that decides which rows a number means.

        A batch that is partly read is read again after a restart.
        """
        return {"batch": self._batch, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the global batch that ``state`` names.

        Raises:
            DataError: The number means other rows here than where the state was taken.
        """
        for key in state["order"] | self._order:
            here, there = (order.get(key, []) for order in (self._order, state["order"]))  # []: no ramp
            if here != there:
                raise DataError(
                    f"{key}={here}: must be {there}, as where the checkpoint was made, to go on with the "
                    "same data; for other data start from its weights with checkpoint.init"
                )
        self._batch, self._read = state["batch"], 0

    def _rows(self, first: int, *, count: int) -> Batch:
        numbers = np.arange(first, first + count, dtype=np.uint64)
        return assemble(self._source.read(numbers), n_mtp=self._n_mtp)


def vocab_size(config: DataConfig) -> int:
    """Number of tokens that the data may hold; a model's vocabulary must not be smaller.

    Raises:
        DataError: The folder of shards is not whole.
    """
    if config.kind is Kind.synthetic:
        return _alphabet(config)
    return read_manifest(_folder(config)).tokenizer.vocab_size


def fingerprint(config: DataConfig, *, split: str) -> str:
    """Short name of the tokens of a split: two folders have the same if their shards hold the same tokens.

    Raises:
        DataError: The folder of shards is not whole.
    """
    if config.kind is Kind.synthetic:
        return f"synthetic/{_alphabet(config)}"
    shards = read_manifest(_folder(config)).splits[split].shards
    return hashlib.sha256(" ".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]


def _open(
    config: DataConfig, *, split: str, seq_len: int, n_lookahead: int, seed: int
) -> ShardSource | SyntheticSource:
    if config.kind is Kind.synthetic:
        return SyntheticSource(_alphabet(config), split=split, n_tokens=seq_len + n_lookahead, seed=seed)
    return ShardSource(_folder(config), split=split, seq_len=seq_len, n_lookahead=n_lookahead, seed=seed)


def _alphabet(config: DataConfig) -> int:
    assert config.vocab_size is not None, f"{config=}"
    return config.vocab_size


def _folder(config: DataConfig) -> str:
    assert config.folder is not None, f"{config=}"
    return config.folder
