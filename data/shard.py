"""Reading a shard in place: memory-mapped, and no byte is used before its checksum was verified.

``NAME.bin`` holds the tokens and nothing else. ``NAME.idx`` holds, little-endian:

    header      magic (8 bytes), tokens, documents (uint64), CRC-32 of both and of the two tables (uint32), 0 (uint32)
    table 1     CRC-32 of every 64 KiB block of the .bin (uint32)
    table 2     CRC-32 of every 64 KiB block of the starts (uint32), then zeros up to a multiple of 8 bytes
    starts      token number at which each document starts, ascending from 0 (uint64)
"""

import bisect
import mmap
import struct
import zlib
from pathlib import Path

import numpy as np

from data.errors import DataError

BLOCK = 65536  # bytes under one checksum
MAGIC = b"PTZSHRD1"
HEADER = struct.Struct("<8sQQII")
START = np.dtype("<u8")
STARTS_IN_BLOCK = BLOCK // START.itemsize


def crc_table(content: bytes | memoryview) -> bytes:
    """CRC-32 of every block of ``content``."""
    crcs = [zlib.crc32(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]
    return np.array(crcs, dtype="<u4").tobytes()


def build_index(token_crcs: bytes, *, n_tokens: int, starts: np.ndarray) -> bytes:
    """Content of the ``.idx`` file.

    Args:
        token_crcs: table 1.
        n_tokens: tokens in the shard.
        starts: (documents,) token number of each document's start.
    """
    content = starts.astype(START).tobytes()
    tables = _pad(token_crcs + crc_table(content))
    return _header(tables, n_tokens=n_tokens, n_documents=len(starts)) + tables + content


class Blocks:
    """A file's bytes from ``offset`` on, each block verified when it is first touched."""

    def __init__(self, path: Path, *, offset: int, size: int, crcs: np.ndarray) -> None:
        """Map a file whose size was already checked."""
        with open(path, "rb") as file:
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[offset : offset + size]
        self._path = path
        self._offset = offset
        self._crcs = crcs
        self._verified = bytearray(len(crcs))

    def touch(self, first: int, *, end: int) -> None:
        """Verify the blocks of bytes ``first`` … ``end - 1``.

        Raises:
            DataError: A block is not what was written.
        """
        for block in range(first // BLOCK, (end - 1) // BLOCK + 1):
            if not self._verified[block]:
                self._verify(block)

    def _verify(self, block: int) -> None:
        start = block * BLOCK
        content = self.bytes[start : start + BLOCK]
        if zlib.crc32(content) != self._crcs[block]:
            first, last = self._offset + start, self._offset + start + len(content) - 1
            raise DataError(
                f"{self._path}: block {block} (bytes {first} to {last}) is damaged: its checksum differs; "
                "remove the folder and prepare it anew"
            )
        self._verified[block] = 1


class Shard:
    """One shard, opened for reading."""

    def __init__(self, path: Path, *, n_tokens: int, n_documents: int, dtype: np.dtype) -> None:
        """Open ``path``.bin and ``path``.idx; reads the header and the checksums only.

        Raises:
            DataError: A file is missing, has another size than the manifest says, or its header is damaged.
        """
        self.n_tokens = n_tokens
        self._dtype = dtype
        tokens_path, index_path = files(path)
        sizes = file_sizes(n_tokens=n_tokens, n_documents=n_documents, dtype=dtype)
        for file, size in zip((tokens_path, index_path), sizes, strict=True):
            check_size(file, expected=size)
        n_token_blocks = -(-sizes[0] // BLOCK)
        n_start_blocks = -(-n_documents * START.itemsize // BLOCK)
        n_table = -(-(n_token_blocks + n_start_blocks) * 4 // 8) * 8
        with open(index_path, "rb") as index:
            header, tables = index.read(HEADER.size), index.read(n_table)
        if header != _header(tables, n_tokens=n_tokens, n_documents=n_documents):
            raise DataError(f"{index_path}: its header is damaged; remove the folder and prepare it anew")
        crcs = np.frombuffer(tables, dtype="<u4")
        self._token_blocks = Blocks(tokens_path, offset=0, size=sizes[0], crcs=crcs[:n_token_blocks])
        self._start_blocks = Blocks(
            index_path,
            offset=HEADER.size + n_table,
            size=n_documents * START.itemsize,
            crcs=crcs[n_token_blocks : n_token_blocks + n_start_blocks],
        )
        self._tokens = np.frombuffer(self._token_blocks.bytes, dtype=dtype)
        self._starts = np.frombuffer(self._start_blocks.bytes, dtype=START)

    def tokens(self, first: int, *, end: int) -> np.ndarray:
        """Tokens ``first`` … ``end - 1``, a view of the file.

        Raises:
            DataError: A block that they lie in is damaged.
        """
        self._token_blocks.touch(first * self._dtype.itemsize, end=end * self._dtype.itemsize)
        return self._tokens[first:end]

    def starts(self, first: int, *, end: int) -> np.ndarray:
        """Token numbers of the documents that start at ``first`` … ``end - 1``, ascending.

        Raises:
            DataError: A block of starts that the search looks at is damaged.
        """
        low, high = self._document_at(first), self._document_at(end)
        if high > low:
            self._start_blocks.touch(low * START.itemsize, end=high * START.itemsize)
        return self._starts[low:high]

    def _document_at(self, token: int) -> int:
        """Number of the first document that starts at ``token`` or later: first its block of starts, then within it."""
        n_blocks = -(-len(self._starts) // STARTS_IN_BLOCK)
        later = bisect.bisect_right(range(1, n_blocks), token, key=self._first_start)  # blocks 1 … later start by then
        first = later * STARTS_IN_BLOCK
        self._start_blocks.touch(first * START.itemsize, end=first * START.itemsize + 1)
        inside = self._starts[first : first + STARTS_IN_BLOCK]
        return first + int(inside.searchsorted(np.uint64(token)))  # of another type, it would copy the whole

    def _first_start(self, block: int) -> int:
        self._start_blocks.touch(block * BLOCK, end=block * BLOCK + 1)
        return int(self._starts[block * STARTS_IN_BLOCK])


def files(path: Path) -> tuple[Path, Path]:
    """The two files of a shard: tokens, index."""
    return path.with_name(path.name + ".bin"), path.with_name(path.name + ".idx")


def file_sizes(*, n_tokens: int, n_documents: int, dtype: np.dtype) -> tuple[int, int]:
    """Bytes of the two files."""
    n_bytes = n_tokens * dtype.itemsize
    n_crcs = -(-n_bytes // BLOCK) + -(-n_documents * START.itemsize // BLOCK)
    return n_bytes, HEADER.size + -(-n_crcs * 4 // 8) * 8 + n_documents * START.itemsize


def check_size(path: Path, *, expected: int) -> None:
    """Check that a file is there and has the bytes it should.

    Raises:
        DataError: It has not.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: the shard cannot be opened: {error.strerror}") from error
    if size != expected:
        raise DataError(f"{path}: the shard has {size} bytes: must be {expected}; remove the folder, prepare it anew")


def _header(tables: bytes, *, n_tokens: int, n_documents: int) -> bytes:
    numbers = struct.pack("<QQ", n_tokens, n_documents)
    return HEADER.pack(MAGIC, n_tokens, n_documents, zlib.crc32(tables, zlib.crc32(numbers)), 0)


def _pad(content: bytes) -> bytes:
    return content + bytes(-len(content) % 8)
