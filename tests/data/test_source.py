"""Windows of a corpus."""

import numpy as np
import pytest

from data.errors import DataError
from data.source import ShardSource


def open_source(config, *, split="train", seq_len=16, n_lookahead=1, seed=0):
    return ShardSource(config.folder, split=split, seq_len=seq_len, n_lookahead=n_lookahead, seed=seed)


@pytest.mark.parametrize(
    ("seq_len", "n_lookahead", "shard_tokens"), [(16, 1, 100), (7, 3, 90), (300, 2, 400), (1, 1, 130)]
)
def test_windows_are_cuts_of_the_concatenated_documents(make_shards, texts, stream, seq_len, n_lookahead, shard_tokens):
    tokens, starts = stream
    source = open_source(make_shards(texts, shard_tokens=shard_tokens), seq_len=seq_len, n_lookahead=n_lookahead)
    assert source.n_windows == (len(tokens) - n_lookahead) // seq_len
    numbers = np.arange(source.n_windows, dtype=np.uint64)
    rows = source.read(numbers)
    for row, window in enumerate(source.order(numbers).tolist()):
        cut = slice(window * seq_len, window * seq_len + seq_len + n_lookahead)
        assert rows.tokens[row].tolist() == tokens[cut]
        assert rows.starts[row].tolist() == starts[cut]


def test_each_epoch_reads_every_window_once_in_its_own_order(make_shards, texts):
    source = open_source(make_shards(texts))
    n = source.n_windows
    epochs = source.order(np.arange(3 * n, dtype=np.uint64)).reshape(3, n).tolist()
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_another_seed_is_another_order(make_shards, texts):
    config = make_shards(texts)
    numbers = np.arange(50, dtype=np.uint64)
    orders = [open_source(config, seed=seed).order(numbers).tolist() for seed in (0, 1, -1)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_validation_is_read_in_order_with_any_seed(make_shards, texts):
    source = open_source(make_shards(texts, validation=0.3), split="validation", seed=5)
    n = source.n_windows
    assert source.order(np.arange(n + 2, dtype=np.uint64)).tolist() == [*range(n), 0, 1]


def test_a_split_smaller_than_a_row_is_refused_with_its_size(make_shards):
    config = make_shards(["abcd"])
    with pytest.raises(DataError, match=r"train has 5 tokens: must have 6 or more for one row; lower train.seq_len"):
        open_source(config, seq_len=5)
    open_source(config, seq_len=4)
    with pytest.raises(DataError, match=r"validation has 0 tokens: .* another share of validation"):
        open_source(config, split="validation", seq_len=4)


def test_a_missing_shard_is_reported_before_it_is_needed(make_shards, texts, tmp_path):
    config = make_shards(texts, shard_tokens=500)
    (tmp_path / "shards" / "train-00004.bin").unlink()
    with pytest.raises(DataError, match=r"train-00004\.bin: the shard cannot be opened"):
        open_source(config)


def test_no_shard_is_opened_before_it_is_needed(make_shards, texts, monkeypatch):
    opened = []
    monkeypatch.setattr("data.source.Shard", lambda path, **_: opened.append(path))
    open_source(make_shards(texts, shard_tokens=500))
    assert not opened
