"""Targets, positions, documents and MTP of a row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.batch import assemble
from data.rows import Rows


def make(tokens, starts, *, n_mtp):
    return assemble(Rows(tokens=np.array(tokens), starts=np.array(starts, dtype=bool)), n_mtp=n_mtp)


def reference(tokens, starts, *, n_mtp):
    """Plain loops over one row."""
    seq_len = len(tokens) - 1 - n_mtp
    documents, positions = [], []
    for i in range(len(tokens)):
        new = i > 0 and starts[i]
        documents.append(0 if i == 0 else documents[-1] + int(new))
        positions.append(0 if i == 0 or new else positions[-1] + 1)
    targets = [tokens[i + 1] if documents[i + 1] == documents[i] else -100 for i in range(seq_len)]
    mtp_tokens, mtp_targets = [], []
    for k in range(1, n_mtp + 1):
        same = [documents[i + k + 1] == documents[i] for i in range(seq_len)]
        mtp_tokens.append([tokens[i + k] if same[i] else 0 for i in range(seq_len)])
        mtp_targets.append([tokens[i + k + 1] if same[i] else -100 for i in range(seq_len)])
    return tokens[:seq_len], targets, positions[:seq_len], documents[:seq_len], mtp_tokens, mtp_targets


def test_the_example_of_the_docstring_holds():
    a, b, end, c, d, e, f = range(1, 8)
    batch = make([[a, b, end, c, d, e, f]], [[0, 0, 0, 1, 0, 0, 0]], n_mtp=1)
    assert batch.tokens.tolist() == [[a, b, end, c, d]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.targets.tolist() == [[b, end, -100, d, e]]
    assert batch.mtp_tokens.tolist() == [[[b, 0, 0, d, e]]]
    assert batch.mtp_targets.tolist() == [[[end, -100, -100, e, f]]]


@given(data=st.data(), n_rows=st.integers(1, 3), seq_len=st.integers(1, 12), n_mtp=st.integers(0, 3))
def test_rows_equal_a_plain_reference(data, n_rows, seq_len, n_mtp):
    length = seq_len + 1 + n_mtp
    row = st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=length, max_size=length)
    rows = [data.draw(row) for _ in range(n_rows)]
    tokens = [[token for token, _ in row] for row in rows]
    starts = [[start for _, start in row] for row in rows]
    batch = make(tokens, starts, n_mtp=n_mtp)
    for number in range(n_rows):
        expected = reference(tokens[number], starts[number], n_mtp=n_mtp)
        found = (batch.tokens, batch.targets, batch.positions, batch.documents, batch.mtp_tokens, batch.mtp_targets)
        assert [tensor[number].tolist() for tensor in found] == list(expected)


def test_a_row_that_begins_inside_a_document_is_like_one_that_begins_with_it():
    inside, at_start = [make([[4, 5, 6]], [[start, 0, 0]], n_mtp=0) for start in (0, 1)]
    for batch in (inside, at_start):
        assert batch.positions.tolist() == [[0, 1]]
        assert batch.documents.tolist() == [[0, 0]]


def test_shapes_hold_without_mtp_and_tensors_move_together():
    batch = make([[1, 2, 3, 4]], [[1, 0, 0, 0]], n_mtp=0)
    assert batch.mtp_tokens.shape == batch.mtp_targets.shape == (1, 0, 3)
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.mtp_targets.device.type == "meta"
    assert all(tensor.is_contiguous() for tensor in (batch.tokens, batch.targets, batch.positions, batch.documents))
