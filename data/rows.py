"""What every source hands to the loader."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Rows of tokens with their look-ahead, L = seq_len + 1 + n_mtp.

    ``tokens``: int64 (B, L). ``starts``: bool (B, L), true where a document starts.
    """

    tokens: np.ndarray
    starts: np.ndarray
