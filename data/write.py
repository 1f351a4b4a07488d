"""Writing shards: a segment at a time, so that a killed preparation continues with the next one."""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from data.files import PARTIAL, publish, write_whole, writing
from data.manifest import ShardEntry
from data.resume import Progress
from data.shard import BLOCK, build_index, files

COUNTED_AT_ONCE = 2**20  # tokens: counting them one document at a time costs a vocabulary each


class ShardWriter:
    """One shard that grows by whole documents."""

    def __init__(self, path: Path) -> None:
        """Start ``path``.bin under another name; it has its own once it is whole."""
        self._path, self._index_path = files(path)
        self._partial = self._path.with_name(self._path.name + PARTIAL)
        with writing(self._path):
            self._file = open(self._partial, "wb")
        self._tail = bytearray()  # what does not fill a block yet
        self._crcs: list[int] = []
        self._sha256 = hashlib.sha256()
        self._starts: list[int] = []
        self._text_bytes = 0
        self.n_tokens = 0

    def add(self, tokens: np.ndarray, *, text_bytes: int) -> None:
        """Append a document, EOS included.

        Raises:
            DataError: The disk is full.
        """
        self._starts.append(self.n_tokens)
        self.n_tokens += len(tokens)
        self._text_bytes += text_bytes
        self._tail += tokens.tobytes()
        whole = len(self._tail) // BLOCK * BLOCK
        if whole:
            self._put(bytes(self._tail[:whole]))
            del self._tail[:whole]

    def finish(self) -> ShardEntry:
        """Put both files in place.

        Raises:
            DataError: The disk is full.
        """
        if self._tail:
            self._put(bytes(self._tail))
        with writing(self._path), self._file:
            self._file.flush()
            publish(self._file.fileno(), partial=self._partial, path=self._path)
        crcs = np.array(self._crcs, dtype="<u4").tobytes()
        write_whole(self._index_path, content=build_index(crcs, n_tokens=self.n_tokens, starts=np.array(self._starts)))
        return ShardEntry(
            name=self._path.stem,
            tokens=self.n_tokens,
            documents=len(self._starts),
            text_bytes=self._text_bytes,
            sha256=self._sha256.hexdigest(),
        )

    def abandon(self) -> None:
        """Give up: close and remove what was written."""
        with writing(self._path):
            try:
                self._file.close()  # fails too while the disk is full
            finally:
                os.unlink(self._partial)

    def _put(self, content: bytes) -> None:
        with writing(self._path):
            self._file.write(content)
        self._sha256.update(content)
        self._crcs += [zlib.crc32(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]


class CorpusWriter:
    """Both splits' shards of one segment after another.

    A segment ends when its training shard is full. Then the validation shard ends with it, however small, so that
    what is finished is a whole number of documents of the source and the rest can be made again, byte by byte.
    """

    def __init__(
        self, folder: Path, *, progress: Progress, dtype: np.dtype, shard_tokens: int, held_out: float
    ) -> None:
        """Continue after what ``progress`` lists as finished.

        Args:
            folder: of the shards.
            progress: changed and saved at the end of each segment.
            dtype: of a token.
            shard_tokens: size at which a training shard is full.
            held_out: share of documents for validation.
        """
        self._folder = folder
        self._progress = progress
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._threshold = round(held_out * 2**64)
        self._open: dict[str, ShardWriter] = {}
        self._uncounted: list[np.ndarray] = []
        self._n_uncounted = 0

    def add(self, tokens: np.ndarray, *, content: bytes, number: int) -> None:
        """Append a document to the split that the hash of its text draws.

        Not its number: copies of a text then never lie on both sides, and the split does not depend on the order.

        Args:
            tokens: with EOS.
            content: the text in UTF-8.
            number: of the document in the source.

        Raises:
            DataError: The disk is full.
        """
        digest = hashlib.blake2b(content, digest_size=8).digest()
        split = "validation" if int.from_bytes(digest, "little") < self._threshold else "train"
        if split not in self._open:
            name = f"{split}-{len(self._progress.shards[split]):05d}"
            self._open[split] = ShardWriter(self._folder / name)
        tokens = tokens.astype(self._dtype)
        self._open[split].add(tokens, text_bytes=len(content))
        self._uncounted.append(tokens)
        self._n_uncounted += len(tokens)
        if self._n_uncounted >= COUNTED_AT_ONCE:
            self._count()
        if split == "train" and self._open[split].n_tokens >= self._shard_tokens:
            self.end_segment(n_documents=number + 1)

    def end_segment(self, *, n_documents: int) -> None:
        """Finish the open shards and note that the source's first ``n_documents`` are done.

        Raises:
            DataError: The disk is full.
        """
        self._count()
        for split in sorted(self._open):
            self._progress.shards[split].append(self._open[split].finish())
            del self._open[split]
        self._progress.n_documents = n_documents
        self._progress.save(self._folder)

    def abandon(self) -> None:
        """Remove what is not finished, to leave a full disk some room."""
        for writer in self._open.values():
            writer.abandon()
        self._open.clear()

    def _count(self) -> None:
        if self._uncounted:
            tokens = np.concatenate(self._uncounted)
            self._progress.counts += np.bincount(tokens, minlength=len(self._progress.counts))
        self._uncounted, self._n_uncounted = [], 0
