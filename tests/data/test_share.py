import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch
from data.share import share


def whole(n_rows):
    rows = torch.arange(n_rows)[:, None].expand(n_rows, 3)
    deep = rows[:, None].expand(n_rows, 2, 3)
    return Batch(rows, rows, rows, rows, deep, deep)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(1, 4), st.integers(1, 3))
def test_every_row_counts_once_and_every_rank_has_as_many_forwards(n_rows, world_size, micro_batch):
    parts = [share(whole(n_rows), rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert all(batch.tokens.shape == (micro_batch, 3) for batch in batches)
    for name in ("targets", "mtp_targets"):
        rows = torch.cat([getattr(batch, name).flatten(1)[:, 0] for batch in batches])
        assert sorted(rows[rows >= 0].tolist()) == list(range(n_rows))


def test_the_example_of_the_docstring():
    second = share(whole(5), rank=1, world_size=2, micro_batch=2)
    assert [batch.tokens[:, 0].tolist() for batch in second] == [[4, 4], [4, 4]]
    assert [batch.targets[:, 0].tolist() for batch in second] == [[4, -100], [-100, -100]]
