"""Masks of some queries of each row, against those of whole rows."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernel import sdpa
from zoo.kernel_flex import flex
from zoo.kernel_plain import plain
from zoo.mask import Mask
from zoo.section import section


def packed(*rows):
    """Documents and positions of rows given as lengths of their documents."""
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in rows])
    return documents, torch.tensor([[t for n in row for t in range(n)] for row in rows])


def everything(mask):
    """(2, T, T) of a mask of two rows."""
    length = mask.positions.shape[1]
    return mask.part(queries=range(length), keys=range(length))[:, 0].expand(2, -1, -1)


def drawn_mask(row, window, chunk, told):
    documents, positions = packed(row, row[::-1])
    return Mask(documents if told or len(row) > 1 else None, positions, None if chunk else window, chunk)


masks = st.builds(
    drawn_mask,
    row=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 9),
    chunk=st.none() | st.integers(1, 9),
    told=st.booleans(),
)


def test_a_window_reaches_back_before_the_queries():
    part = section(Mask(None, torch.arange(6).expand(2, 6), window=3), range(3, 5))
    assert part.keys == range(1, 5) and part.dense[0, 0].int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert part.ends.tolist() == [0, 2, 4] and part.key_ends.tolist() == [0, 4, 8]


def test_a_piece_may_have_keys_alone():
    part = section(Mask(*packed([2, 3], [4, 1])), range(2, 5))
    assert part.key_ends.tolist() == [0, 2, 5, 9, 10] and part.ends.tolist() == [0, 0, 3, 5, 6]
    assert part.ends.dtype is part.key_ends.dtype is torch.int32 and (part.longest, part.key_longest) == (3, 5)


@settings(deadline=None, max_examples=60)
@given(mask=masks, data=st.data())
def test_every_rendering_of_a_section_is_that_part_of_the_row(mask, data):
    length, whole = mask.positions.shape[1], everything(mask)
    first = data.draw(st.integers(0, length - 1))
    queries = range(first, data.draw(st.integers(first + 1, length)))
    part = section(mask, queries)
    assert section(mask, queries) is part
    Q, N = len(queries), len(part.keys)
    want = whole[:, first : queries.stop, part.keys.start : part.keys.stop]
    assert whole[:, first : queries.stop].sum() == want.sum(), "a key out of reach is seen"
    assert torch.equal(part.positions, mask.positions[:, first : queries.stop])
    dense = torch.ones(Q, N, dtype=torch.bool).tril()[None, None] if part.dense is None else part.dense
    assert torch.equal(dense[:, 0].expand(2, -1, -1), want)

    some = range(data.draw(st.integers(0, Q - 1)), Q)
    reached = part.reach(some)
    assert not want[:, some.start :, : reached.start].any() and reached.stop == N
    assert torch.equal(
        part.part(queries=some, keys=reached)[:, 0].expand(2, -1, -1), want[:, some.start :, reached.start :]
    )

    # As flash attention takes sequences of unlike lengths: queries are the last keys, windows count from there.
    counts, key_counts = part.ends.diff(), part.key_ends.diff()
    assert counts.max() <= part.longest and key_counts.max() <= part.key_longest and len(counts) == len(key_counts)
    seen = torch.zeros(2 * Q, 2 * N, dtype=torch.bool)
    for n, m, q, k in zip(
        counts.tolist(), key_counts.tolist(), part.ends.tolist(), part.key_ends.tolist(), strict=False
    ):
        gap = torch.arange(n)[:, None] + m - n - torch.arange(m)
        seen[q : q + n, k : k + m] = (gap >= 0) & (gap < (part.window or length))
    rows = torch.zeros(2 * Q, 2 * N, dtype=torch.bool)
    rows[:Q, :N], rows[Q:, N:] = want
    assert torch.equal(seen, rows)


@settings(deadline=None, max_examples=60)
@given(mask=masks, runs=st.integers(1, 6))
def test_a_table_says_which_runs_see_nothing_some_or_all_of_each_other(mask, runs):
    length = mask.positions.shape[1]
    if length % runs:
        return
    whole, causal = everything(mask), torch.ones(length, length, dtype=torch.bool).tril()
    tiles = [x.unflatten(-1, (runs, -1)).unflatten(-3, (runs, -1)) for x in (whole, causal)]  # (…, runs, t, runs, t)
    seen = tiles[0].any(0).any(1).any(-1)
    full = (tiles[0] == tiles[1]).all(0).all(1).all(-1)
    want = torch.where(seen & full, 2, torch.where(seen, 1, 0)).to(torch.uint8)
    if mask.is_causal:
        assert mask.table(runs) is None and torch.equal(want, 2 * torch.ones_like(want).tril())
    else:
        assert torch.equal(mask.table(runs), want) and mask.table(runs) is mask.table(runs)


def attended(kernel, *inputs):
    """What comes out, without the largest logits that two kernels may give beside it."""
    result = kernel(*inputs, scale=0.3)
    return result if kernel is sdpa else result[0]


@pytest.mark.parametrize("bounds", [{}, {"window": 4}, {"chunk": 5}])
@pytest.mark.parametrize("kernel", [plain, sdpa, flex])
def test_kernels_give_some_queries_what_they_get_in_whole_rows(kernel, bounds):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 12, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    for mask in (Mask(*packed([5, 7], [9, 3]), **bounds), Mask(None, torch.arange(12).expand(2, 12), **bounds)):
        want = attended(kernel, q, k, v, mask)
        for queries in (range(0, 3), range(3, 6), range(9, 12)):
            part = section(mask, queries)
            keys = slice(part.keys.start, part.keys.stop)
            got = attended(kernel, q[:, queries.start : queries.stop], k[:, keys], v[:, keys], part)
            torch.testing.assert_close(got, want[:, queries.start : queries.stop], rtol=1e-12, atol=1e-13)


def test_a_mask_and_its_sections_end_with_the_forward():
    mask = Mask(*packed([2, 3], [4, 1]))
    gc.disable()  # what is held in a circle would wait for it, and masks are large
    try:
        assert section(mask, range(2, 5)).dense is not None
        gone = weakref.ref(mask), weakref.ref(section(mask, range(2, 5)))
        del mask
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()
