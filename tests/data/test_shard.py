"""Reading shards, damaged ones too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.shard import BLOCK, STARTS_IN_BLOCK, Shard
from data.write import ShardWriter

DTYPE = np.dtype("<u2")
N_DOCUMENTS = 3 * STARTS_IN_BLOCK + 17  # so that the search crosses blocks of starts


def write(folder, lengths):
    writer = ShardWriter(folder / "train-00000")
    first = 0
    for length in lengths:
        writer.add((np.arange(first, first + length) % 60_000).astype(DTYPE), text_bytes=length)
        first += length
    return writer.finish()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    lengths = [1 + number * 5 % 13 for number in range(N_DOCUMENTS)]
    return folder, write(folder, lengths), np.concatenate([[0], np.cumsum(lengths)[:-1]])


def opened(folder, entry):
    return Shard(folder / entry.name, n_tokens=entry.tokens, n_documents=entry.documents, dtype=DTYPE)


def copy(written, target):
    folder, entry, _ = written
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target, entry


def flip(path, byte):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_what_was_written_is_read(written):
    folder, entry, starts = written
    shard = opened(folder, entry)
    assert (shard.tokens(0, end=entry.tokens) == np.arange(entry.tokens) % 60_000).all()
    assert (shard.starts(0, end=entry.tokens) == starts).all()


@given(data=st.data())
def test_starts_of_any_range_equal_a_plain_search(written, data):
    folder, entry, starts = written
    shard = opened(folder, entry)
    first = data.draw(st.integers(0, entry.tokens - 1) | st.sampled_from(starts.tolist()))
    end = data.draw(st.integers(first + 1, entry.tokens))
    assert (shard.starts(first, end=end) == starts[(starts >= first) & (starts < end)]).all()


def test_a_damaged_byte_is_reported_with_shard_and_block_and_only_when_touched(written, tmp_path):
    folder, entry = copy(written, tmp_path)
    flip(folder / "train-00000.bin", 2 * BLOCK + 5)
    shard = opened(folder, entry)
    shard.tokens(0, end=2 * BLOCK // DTYPE.itemsize)
    with pytest.raises(DataError, match=r"train-00000\.bin: block 2 \(bytes 131072 to 196607\) is damaged"):
        shard.tokens(BLOCK, end=BLOCK + 1)


def test_a_damaged_document_start_is_reported(written, tmp_path):
    folder, entry = copy(written, tmp_path)
    flip(folder / "train-00000.idx", -8)
    shard = opened(folder, entry)
    shard.starts(0, end=10)
    with pytest.raises(DataError, match=r"train-00000\.idx: block 3 .* is damaged"):
        shard.starts(entry.tokens - 5, end=entry.tokens)


@pytest.mark.parametrize("byte", [0, 8, 17, 24, 32, 40])
def test_a_damaged_header_or_checksum_is_reported_at_once(written, tmp_path, byte):
    folder, entry = copy(written, tmp_path)
    flip(folder / "train-00000.idx", byte)
    with pytest.raises(DataError, match=r"train-00000\.idx: its header is damaged"):
        opened(folder, entry)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_a_truncated_or_missing_file_is_reported_at_once(written, tmp_path, name):
    folder, entry = copy(written, tmp_path)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name}: the shard has \d+ bytes: must be \d+"):
        opened(folder, entry)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: the shard cannot be opened: No such file"):
        opened(folder, entry)


@pytest.mark.parametrize("n_tokens", [1, BLOCK // 2, BLOCK // 2 + 1])
def test_sizes_around_a_block_are_read(tmp_path, n_tokens):
    entry = write(tmp_path, [n_tokens])
    shard = opened(tmp_path, entry)
    assert shard.tokens(n_tokens - 1, end=n_tokens).tolist() == [(n_tokens - 1) % 60_000]
    assert shard.starts(0, end=n_tokens).tolist() == [0]
