"""Documents to token arrays, in batches that the libraries spread over their threads."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.text import Document
from data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**22  # bounds memory: a token of a Python list takes 36 bytes
PIECE_CHARACTERS = 2**18  # longer texts are cut after a line break, for memory and for the threads


@dataclass(frozen=True)
class Tokenized:
    """A document: its number in the source, its UTF-8, its tokens with EOS (int64)."""

    number: int
    content: bytes
    tokens: np.ndarray


def encode(documents: Iterable[Document], *, tokenizer: Tokenizer, threads: int) -> Iterator[Tokenized]:
    """Tokenise documents in order; the result does not depend on batches or threads."""
    batch: list[Document] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document.text)
        if n_characters >= BATCH_CHARACTERS:
            yield from _batch(batch, tokenizer=tokenizer, threads=threads)
            batch, n_characters = [], 0
    yield from _batch(batch, tokenizer=tokenizer, threads=threads)


def cut(text: str) -> list[str]:
    r"""Cut a text into pieces of at most ``PIECE_CHARACTERS``, after a line break where there is one.

    Example, five characters at most: "ab\ncdefghi" gives "ab\n", "cdefg", "hi".
    """
    pieces = []
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _batch(documents: list[Document], *, tokenizer: Tokenizer, threads: int) -> Iterator[Tokenized]:
    pieces = [cut(document.text) for document in documents]
    encoded = iter(tokenizer.encode_batch([piece for group in pieces for piece in group], threads=threads))
    for document, group in zip(documents, pieces, strict=True):
        tokens = [np.array(next(encoded), dtype=np.int64) for _ in group]
        yield Tokenized(
            number=document.number,
            content=document.text.encode(),
            tokens=np.concatenate([*tokens, np.array([tokenizer.eos])]),
        )
