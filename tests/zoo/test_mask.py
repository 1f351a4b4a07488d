import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.context import Context
from zoo.mask import Mask


def packed(*rows):
    """Documents and positions of rows given as lengths of their documents."""
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in rows])
    return documents, torch.tensor([[t for n in row for t in range(n)] for row in rows])


def sees(documents, positions, window, chunk, i, j):
    """The rule itself, for tokens i and j of a row."""
    near = window is None or i - j < window
    together = chunk is None or positions[i] // chunk == positions[j] // chunk
    return bool(j <= i and documents[i] == documents[j] and near and together)


def test_documents_see_themselves_and_the_past():
    mask = Mask(*packed([2, 3])).dense
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask[0, 0].int().tolist() == want


def test_a_window_ends_at_its_document():
    mask = Mask(*packed([2, 3]), window=2).dense
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert mask[0, 0].int().tolist() == want


def test_chunks_are_counted_from_the_start_of_each_document():
    mask = Mask(*packed([3, 3]), chunk=2)
    assert mask.pieces.tolist() == [[0, 0, 1, 2, 2, 3]]
    assert mask.dense[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("bounds", [{}, {"window": 5}, {"window": 9}, {"chunk": 5}])
def test_one_document_within_window_or_chunk_needs_no_mask(bounds):
    mask = Mask(None, torch.arange(5).expand(2, 5), **bounds)
    assert mask.is_causal and mask.dense is None
    assert mask.ends.tolist() == [0, 5, 10]


def test_binding_windows_and_chunks_are_no_plain_causal_mask():
    positions = torch.arange(5).expand(2, 5)
    assert not Mask(None, positions, window=4).is_causal
    assert not Mask(None, positions, chunk=4).is_causal
    assert Mask(None, positions, chunk=4).ends.tolist() == [0, 4, 5, 9, 10]


def test_pieces_are_laid_end_to_end():
    mask = Mask(*packed([2, 3], [1, 4]))
    assert mask.ends.tolist() == [0, 2, 5, 6, 10] and mask.ends.dtype is torch.int32 and mask.longest == 5
    assert Mask(*packed([2, 3], [1, 4]), chunk=2).ends.tolist() == [0, 2, 4, 5, 6, 8, 10]


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(row=lengths, window=st.none() | st.integers(1, 9), chunk=st.none() | st.integers(1, 9), data=st.data())
def test_every_rendering_says_what_the_rule_says(row, window, chunk, data):
    window = None if chunk else window
    documents, positions = packed(row, row[::-1])
    length = sum(row)
    if len(row) == 1 and data.draw(st.booleans()):
        documents = None
    mask = Mask(documents, positions, window, chunk)
    told = torch.zeros(2, length) if documents is None else documents
    want = torch.tensor(
        [
            [[sees(told[b], positions[b], window, chunk, i, j) for j in range(length)] for i in range(length)]
            for b in range(2)
        ]
    )
    dense = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if mask.dense is None else mask.dense
    assert torch.equal(dense[:, 0].expand(2, -1, -1), want)

    b, i, j = torch.meshgrid(torch.arange(2), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(mask.predicate(b, torch.tensor(0), i, j), want)

    first = data.draw(st.integers(0, length - 1))
    queries = range(first, data.draw(st.integers(first + 1, length)))
    keys = mask.reach(queries)
    assert not want[:, queries.start : queries.stop, : keys.start].any() and keys.stop == queries.stop
    part = mask.part(queries=queries, keys=keys)[:, 0].expand(2, -1, -1)
    assert torch.equal(part, want[:, queries.start : queries.stop, keys.start : keys.stop])

    ends = mask.ends
    assert (ends[1:] - ends[:-1]).max() <= mask.longest
    piece = torch.bucketize(torch.arange(2 * length), ends, right=True).view(2, length)
    inside = (piece[:, :, None] == piece[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    near = torch.arange(length)[:, None] - torch.arange(length) < (window or length)
    assert torch.equal(inside & near, want)


def test_layers_with_equal_bounds_share_a_mask():
    documents, positions = packed([2, 3])
    context = Context(positions, documents, torch.float32, 64)
    assert context.mask(window=3) is context.mask(window=3)
    assert context.mask(window=3) is not context.mask(window=2)
    assert context.mask(window=5) is context.mask()
    assert context.mask(chunk=2) is not context.mask(window=2)
