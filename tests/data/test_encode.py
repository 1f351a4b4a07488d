"""Documents to tokens, in pieces and batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import encode as subject
from data.config import TokenizerKind
from data.encode import cut, encode
from data.text import Document
from data.tokenizer import open_file


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(subject, "PIECE_CHARACTERS", 5)
    monkeypatch.setattr(subject, "BATCH_CHARACTERS", 20)


def test_the_example_of_the_docstring_holds(short_pieces):
    assert cut("ab\ncdefghi") == ["ab\n", "cdefg", "hi"]
    assert cut("") == [""]


@given(text=st.text(alphabet="ab\n", max_size=40))
def test_pieces_are_the_text(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "PIECE_CHARACTERS", 5)
        pieces = cut(text)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 5 for piece in pieces) or text == ""


def test_batches_and_threads_change_nothing(byte_ranks, short_pieces):
    tokenizer = open_file(byte_ranks, kind=TokenizerKind.tiktoken, eos=None)
    documents = [Document(number=number, text="é\nab" * (number % 9)) for number in range(3, 40)]
    for threads in (1, 3):
        found = list(encode(documents, tokenizer=tokenizer, threads=threads))
        assert [document.number for document in found] == list(range(3, 40))
        for document, tokenized in zip(documents, found, strict=True):
            assert tokenized.content == document.text.encode()
            assert tokenized.tokens.tolist() == [*tokenized.content, tokenizer.eos]
