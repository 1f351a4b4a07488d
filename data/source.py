"""Windows of a corpus: fixed cuts of the concatenated documents of a split, in an order made of (seed, epoch)."""

import bisect
import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.hashing import combine
from data.manifest import DTYPES, ShardEntry, read_manifest
from data.permutation import permute
from data.rows import Rows
from data.shard import Shard, check_size, file_sizes, files

OPEN_SHARDS = 4096  # at once: each maps two files, and Linux allows 65,530 maps to a process


class ShardSource:
    """Rows from the shards of one split.

    Window w holds tokens w·T … w·T + T + look-ahead - 1 of the split's stream, so that no token is an input twice in
    an epoch. Example, T = 2, look-ahead 1, stream a b c d e f: windows abc, cde; f is too short for a third.
    Nothing is built at the start: the order is computed, shards are opened when a window needs them.
    """

    def __init__(self, folder: str, *, split: str, seq_len: int, n_lookahead: int, seed: int) -> None:
        """Open a split; the sizes of all its files are checked.

        Raises:
            DataError: The folder is not whole, a shard is missing or truncated, or the split is too small.
        """
        manifest = read_manifest(folder)
        self._folder = Path(folder)
        self._dtype = DTYPES[manifest.dtype]
        self._shards = manifest.splits[split].shards
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._shards))
        self._seq_len = seq_len
        self._n_tokens = seq_len + n_lookahead
        n_tokens = manifest.splits[split].tokens
        self.n_windows = max(0, n_tokens - n_lookahead) // seq_len
        if self.n_windows == 0:
            raise DataError(
                f"{folder}: {split} has {n_tokens} tokens: must have {self._n_tokens} or more for one row; "
                + ("lower train.seq_len" if n_tokens else "prepare it with another share of validation")
            )
        for shard in self._shards:
            sizes = file_sizes(n_tokens=shard.tokens, n_documents=shard.documents, dtype=self._dtype)
            for file, size in zip(files(self._folder / shard.name), sizes, strict=True):
                check_size(file, expected=size)
        self._seed = seed
        self._shuffles = split == "train"
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def read(self, numbers: np.ndarray) -> Rows:
        """Read the rows with these numbers of the endless sequence of epochs.

        Args:
            numbers: uint64 (B,).

        Raises:
            DataError: A block that a row lies in is damaged.
        """
        windows = self.order(numbers)
        tokens = np.empty((len(windows), self._n_tokens), dtype=np.int64)
        starts = np.zeros(tokens.shape, dtype=bool)
        for row, window in enumerate(windows.tolist()):
            self._read_window(window * self._seq_len, tokens=tokens[row], starts=starts[row])
        return Rows(tokens=tokens, starts=starts)

    def order(self, numbers: np.ndarray) -> np.ndarray:
        """Windows at these places of the endless sequence: shuffled anew in each epoch, but for validation in order.

        Example, 3 windows: epoch 0 might be 1 0 2 and epoch 1 be 2 0 1; places 2 3 4 hold windows 2 2 0.
        """
        size = np.uint64(self.n_windows)
        epochs, places = numbers // size, numbers % size
        if not self._shuffles:
            return places
        return permute(places, size=self.n_windows, key=combine(self._seed, epochs))

    def _read_window(self, first: int, *, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Fill one row from stream position ``first`` on, across shards where it must."""
        number = bisect.bisect_right(self._ends, first)
        filled = 0
        while filled < self._n_tokens:
            shard = self._open(number)
            inside = first + filled - (self._ends[number] - shard.n_tokens)
            end = min(shard.n_tokens, inside + self._n_tokens - filled)
            tokens[filled : filled + end - inside] = shard.tokens(inside, end=end)
            starts[shard.starts(inside, end=end) - np.uint64(inside) + np.uint64(filled)] = True
            filled += end - inside
            number += 1

    def _open_shard(self, number: int) -> Shard:
        entry: ShardEntry = self._shards[number]
        return Shard(self._folder / entry.name, n_tokens=entry.tokens, n_documents=entry.documents, dtype=self._dtype)
