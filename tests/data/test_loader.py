"""Micro-batches of ranks, restarts, and what is refused."""

import dataclasses

import pytest
import torch

from data.batch import Batch
from data.config import DataConfig, Kind
from data.errors import DataError
from data.loader import Loader, vocab_size

SYNTHETIC = DataConfig(kind=Kind.synthetic, vocab_size=64)


def open_loader(config, **changed):
    settings = {"seed": 0, "rank": 0, "world_size": 1, "global_batch": 8, "micro_batch": 8, "seq_len": 16}
    return Loader(config, **{**settings, **changed})


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_equal(found: list[Batch], expected: Batch):
    for field in dataclasses.fields(Batch):
        joined = torch.cat([getattr(batch, field.name) for batch in found])
        assert torch.equal(joined, getattr(expected, field.name)), field.name


@pytest.fixture(params=["shards", "synthetic"])
def config(request, make_shards, texts):
    return SYNTHETIC if request.param == "synthetic" else make_shards(texts)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 1), (4, 2), (8, 1)])
def test_ranks_together_read_the_global_batch(config, world_size, micro_batch):
    whole = open_loader(config, n_mtp=2)
    ranks = [
        open_loader(config, n_mtp=2, rank=rank, world_size=world_size, micro_batch=micro_batch)
        for rank in range(world_size)
    ]
    for number in range(3):
        parts = [batch for rank in ranks for batch in take(rank, 8 // world_size // micro_batch)]
        assert_equal(parts, whole.rows(number))
    assert_equal(take(whole, 1), whole.rows(0))


def test_a_restart_continues_with_the_same_batches(config):
    uninterrupted = take(open_loader(config, micro_batch=4), 10)
    first = open_loader(config, micro_batch=4)
    take(first, 6)
    second = open_loader(config, micro_batch=4)
    second.load_state_dict(first.state_dict())
    started = open_loader(config, micro_batch=4, start=3)
    for batch in uninterrupted[6:]:
        assert_equal([next(second)], batch)
        assert_equal([next(started)], batch)


@pytest.mark.parametrize("change, key", [({"seed": 9}, "seed=9"), ({"global_batch": 16}, "train.global_batch=16")])
def test_a_state_under_which_numbers_mean_other_rows_is_refused(config, change, key):
    state = open_loader(config, micro_batch=1).state_dict()
    with pytest.raises(DataError, match=key):
        open_loader(config, micro_batch=1, **change).load_state_dict(state)


def test_a_global_batch_that_was_partly_read_is_read_again(config):
    loader = open_loader(config, micro_batch=2)
    take(loader, 5)
    assert loader.state_dict()["batch"] == 1
    loader.load_state_dict(loader.state_dict())
    assert_equal(take(loader, 4), loader.rows(1))


def test_a_batch_may_span_two_epochs(make_shards, texts):
    loader = open_loader(make_shards(texts), global_batch=3, micro_batch=3)
    assert loader.n_rows is not None and loader.n_rows % 3
    rows = torch.cat([batch.tokens for batch in take(loader, loader.n_rows)])
    per_epoch = rows.view(3, loader.n_rows, 16)
    assert len({tuple(sorted(map(tuple, epoch))) for epoch in per_epoch.tolist()}) == 1


def test_validation_differs_from_training_and_is_one_pass_in_order(make_shards, texts):
    loader = open_loader(make_shards(texts, validation=0.3), split="validation", global_batch=1, micro_batch=1)
    assert loader.n_rows is not None
    first = torch.cat([batch.tokens for batch in take(loader, loader.n_rows)])
    assert torch.equal(first, torch.cat([batch.tokens for batch in take(loader, loader.n_rows)]))
    synthetic = [open_loader(SYNTHETIC, split=split).rows(0).tokens for split in ("train", "validation")]
    assert not torch.equal(*synthetic)
    assert open_loader(SYNTHETIC).n_rows is None


def test_the_batch_does_not_change_with_look_ahead_of_synthetic_rows():
    plain, ahead = [open_loader(SYNTHETIC, n_mtp=n_mtp).rows(4) for n_mtp in (0, 2)]
    assert torch.equal(plain.tokens, ahead.tokens) and torch.equal(plain.targets, ahead.targets)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"world_size": 3}, r"train\.global_batch=8: must be a multiple of ranks × micro_batch \(3 × 8\)"),
        ({"micro_batch": 0}, r"train\.global_batch=8: must be a multiple"),
        ({"seq_len": 0}, r"train\.seq_len=0: must be 1 or more"),
        ({"split": "test"}, r"split=test: must be one of train, validation"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(changed, message):
    with pytest.raises(DataError, match=message):
        open_loader(SYNTHETIC, **changed)


def test_a_damaged_shard_stops_the_iterator_with_its_name(make_shards, texts, tmp_path):
    loader = open_loader(make_shards(texts))
    path = tmp_path / "shards" / "train-00000.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"train-00000\.bin: block 0 \(bytes 0 to \d+\) is damaged"):
        take(loader, 100)


def test_vocabulary_is_the_tokenizers_or_the_alphabet(make_shards, texts, tmp_path):
    assert vocab_size(make_shards(texts)) == 257
    assert vocab_size(SYNTHETIC) == 64
    with pytest.raises(DataError, match=r"no whole corpus \(manifest\.json is missing\)"):
        vocab_size(DataConfig(kind=Kind.shards, folder=str(tmp_path / "none")))
