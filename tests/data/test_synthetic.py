"""Computed tokens."""

import math
import zlib

import numpy as np

from data.synthetic import EOS, SyntheticSource


def read(count, *, first=0, split="train", n_tokens=64, seed=0, vocab_size=32):
    source = SyntheticSource(vocab_size, split=split, n_tokens=n_tokens, seed=seed)
    return source.read(np.arange(first, first + count, dtype=np.uint64))


def test_a_row_depends_on_seed_split_and_number_alone():
    together = read(8).tokens
    assert (read(3, first=5).tokens == together[5:]).all()
    assert (read(8, seed=1).tokens != together).any()
    assert (read(8, split="validation").tokens != together).any()
    assert len({tuple(row) for row in together.tolist()}) == 8


def test_a_longer_row_begins_with_the_shorter_one():
    short, long = read(4, n_tokens=20), read(4, n_tokens=33)
    assert (long.tokens[:, :20] == short.tokens).all()
    assert (long.starts[:, :20] == short.starts).all()


def test_the_tokens_never_change_between_releases():
    rows = read(16, n_tokens=256, seed=7, vocab_size=256)
    assert rows.tokens[0, :12].tolist() == [162, 164, 166, 168, 170, 172, 1, 3, 5, 7, 9, 11]
    assert zlib.crc32(rows.tokens.astype("<i8").tobytes()) == 2424755227


def test_documents_end_with_eos_and_vary_in_length():
    rows = read(200, n_tokens=300)
    assert (rows.starts[:, 1:] == (rows.tokens[:, :-1] == EOS)).all()
    assert rows.starts[:, 0].all()
    lengths = np.diff(np.flatnonzero(rows.starts.ravel()))
    assert 20 < lengths.mean() < 40 and lengths.std() > 10
    assert rows.tokens.min() == EOS and rows.tokens.max() == 31


def test_a_model_can_learn_the_next_token():
    tokens = read(2000, n_tokens=200).tokens
    pairs = np.zeros((32, 32))
    np.add.at(pairs, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    joint, first = pairs / pairs.sum(), pairs.sum(axis=1) / pairs.sum()
    entropy = -(joint[joint > 0] * np.log(joint[joint > 0])).sum() + (first * np.log(first)).sum()
    assert entropy < 0.75 * math.log(32)  # knowing the last token already tells a good deal
    advance = (tokens[:, 1:] - tokens[:, :-1]) % 31
    repeated = (advance[:, 1:] == advance[:, :-1]).mean()
    assert repeated > 0.6  # and the last two nearly all
