"""Endless learnable tokens without files, for golden losses: every number is integer arithmetic on (seed, row)."""

import numpy as np

from data.hashing import combine, splitmix
from data.rows import Rows

EOS = 0
MEAN_DOCUMENT = 32  # tokens; short, so that rows of 16 already hold several documents
MEAN_JUMP = 8  # tokens between two that cannot be predicted
N_STEPS = 4


class SyntheticSource:
    """Rows of documents, each a count upwards by its own step, broken by jumps to anywhere.

    A document has a step of 1 to 4; a token is its predecessor plus the step, or, one time in eight and at the
    document's start, any token; one in 32 is EOS and ends the document. A model that sees only the last token can
    learn that four continuations are likely; one that sees more learns the step.

    Example, vocabulary 10, step 3, jump at the fourth token: 2 5 8 4 7 0, then another document.
    """

    def __init__(self, vocab_size: int, *, split: str, n_tokens: int, seed: int) -> None:
        """Args: ``n_tokens`` is the length of a row with its look-ahead, ``split`` draws other rows for each name."""
        self.vocab_size = vocab_size
        self.n_tokens = n_tokens
        self._key = combine(seed, *split.encode())

    def read(self, numbers: np.ndarray) -> Rows:
        """Make rows; a longer row begins with the shorter one.

        Args:
            numbers: uint64 (B,).
        """
        index = np.arange(self.n_tokens, dtype=np.int64)[None]
        row = combine(self._key, numbers)[:, None]
        word = splitmix(splitmix(row ^ index.astype(np.uint64)))  # (B, L); bits 0-4 end, 5-7 jump, 16- where to
        ends = word % np.uint64(MEAN_DOCUMENT) == 0
        starts = np.zeros_like(ends)
        starts[:, 0] = True
        starts[:, 1:] = ends[:, :-1]
        document = np.cumsum(starts, axis=1)
        step = combine(row, document) % np.uint64(N_STEPS) + np.uint64(1)
        jumps = starts | (word // np.uint64(MEAN_DOCUMENT) % np.uint64(MEAN_JUMP) == 0)
        last_jump = np.maximum.accumulate(np.where(jumps, index, 0), axis=1)
        landing = np.take_along_axis(word >> np.uint64(16), last_jump, axis=1)
        alphabet = np.uint64(self.vocab_size - 1)  # all but EOS
        count = landing % alphabet + step * (index - last_jump).astype(np.uint64)
        tokens = np.where(ends, EOS, (count % alphabet).astype(np.int64) + 1)
        return Rows(tokens=tokens, starts=starts)
