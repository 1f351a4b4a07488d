"""Batches that grow: which rows they have, who reads them, and restarts among them."""

import pytest
import torch

from data.config import DataConfig, Kind
from data.errors import DataError
from data.loader import Loader
from data.ramp import Cuts

RAMP = ((2, 2), (1, 4))


def open_loader(**changed):
    settings = {"seed": 0, "rank": 0, "world_size": 1, "global_batch": 8, "micro_batch": 1, "seq_len": 16, "ramp": RAMP}
    return Loader(DataConfig(kind=Kind.synthetic, vocab_size=64), **{**settings, **changed})


def tokens(loader, rows):
    return torch.cat([next(loader).tokens for _ in range(rows)])


def test_batches_are_cut_one_after_another():
    cuts = Cuts(4, ((2, 2), (1, 3)))
    assert [cuts.first(i) for i in range(6)] == [0, 2, 4, 7, 11, 15]
    assert [cuts.size(i) for i in range(6)] == [2, 2, 3, 4, 4, 4]


def test_a_ramp_reads_the_same_rows_in_the_same_order():
    assert torch.equal(tokens(open_loader(), 24), tokens(open_loader(ramp=()), 24))


def test_ranks_share_every_batch_whatever_its_size():
    whole = open_loader()
    ranks = [open_loader(rank=rank, world_size=2) for rank in range(2)]
    for number, size in enumerate((2, 2, 4, 8, 8)):
        parts = torch.cat([tokens(rank, size // 2) for rank in ranks])
        assert torch.equal(parts, whole.rows(number).tokens), number


@pytest.mark.parametrize("batches, rows", [(1, 2), (2, 4), (3, 8), (4, 16)])
def test_a_restart_goes_on_within_and_after_a_ramp(batches, rows):
    whole, first, second = open_loader(), open_loader(), open_loader()
    tokens(whole, rows), tokens(first, rows)
    assert first.state_dict()["batch"] == batches
    second.load_state_dict(first.state_dict())
    assert torch.equal(tokens(second, 8), tokens(whole, 8))


@pytest.mark.parametrize("there, here", [(RAMP, ()), ((), RAMP), (RAMP, ((2, 2),))])
def test_another_ramp_is_other_rows(there, here):
    state = open_loader(ramp=there).state_dict()
    with pytest.raises(DataError, match=r"schedule\.batch="):
        open_loader(ramp=here).load_state_dict(state)


def test_a_state_without_a_ramp_is_as_it_was_before_there_were_any():
    assert set(open_loader(ramp=()).state_dict()["order"]) == {"seed", "train.global_batch", "train.seq_len", "data"}


def test_a_stage_that_ranks_cannot_share_is_refused():
    with pytest.raises(DataError, match="=2: must be a multiple"):
        open_loader(world_size=4)
