"""What one forward reads. All that looks across positions is made here, before any plan cuts the sequence."""

from dataclasses import dataclass, fields

import numpy as np
import torch

from data.rows import Rows

NOT_COUNTED = -100  # cross-entropy ignores it


@dataclass(frozen=True)
class Batch:
    """Int64 tensors of B rows of T tokens.

    tokens: (B, T).
    targets: (B, T), the next token; -100 where that belongs to another document.
    positions: (B, T), from 0 at each document start in the row; a document cut by the row's edge starts with the row.
    documents: (B, T), number of the document within the row, from 0.
    mtp_tokens: (B, n_mtp, T), depth k = 1 … n_mtp holds token i+k, or 0 where the target is not counted.
    mtp_targets: (B, n_mtp, T), token i+k+1, or -100 where that belongs to another document than token i.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    mtp_tokens: torch.Tensor
    mtp_targets: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Copy every tensor to ``device``."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def assemble(rows: Rows, *, n_mtp: int) -> Batch:
    """Make what a model reads of rows with their look-ahead.

    Example, T = 5, n_mtp = 1, a document that began before the row and ends with EOS ($), then one that starts:

        tokens read    a   b   $   c   d | e   f       (T + 1 + n_mtp)
        starts         0   0   0   1   0 | 0   0
        tokens         a   b   $   c   d
        documents      0   0   0   1   1
        positions      0   1   2   0   1
        targets        b   $   -   d   e                token i+1; - is -100
        mtp_tokens     b   0   0   d   e                token i+1, for depth 1
        mtp_targets    $   -   -   e   f                token i+2

    Args:
        rows: (B, T + 1 + n_mtp).
        n_mtp: depths of multi-token prediction.
    """
    n_rows, length = rows.tokens.shape
    seq_len = length - 1 - n_mtp
    starts = rows.starts[:, :seq_len].copy()
    starts[:, 0] = False  # whatever began here is document 0, position 0 all the same
    index = np.arange(seq_len)
    positions = np.where(starts, index, 0)  # in place below: fresh memory costs more than the arithmetic
    np.maximum.accumulate(positions, axis=1, out=positions)
    np.subtract(index, positions, out=positions)

    targets = np.empty((n_rows, seq_len), dtype=np.int64)
    mtp_tokens = np.empty((n_rows, n_mtp, seq_len), dtype=np.int64)
    mtp_targets = np.empty_like(mtp_tokens)
    elsewhere = np.zeros((n_rows, seq_len), dtype=bool)  # token i+depth+1 belongs to another document than token i
    for depth in range(n_mtp + 1):
        target = mtp_targets[:, depth - 1] if depth else targets
        elsewhere |= rows.starts[:, depth + 1 : depth + 1 + seq_len]
        target[...] = rows.tokens[:, depth + 1 : depth + 1 + seq_len]
        target[elsewhere] = NOT_COUNTED
        if depth:
            mtp_tokens[:, depth - 1] = rows.tokens[:, depth : depth + seq_len]
            mtp_tokens[:, depth - 1][elsewhere] = 0
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(rows.tokens[:, :seq_len])),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        documents=torch.from_numpy(np.cumsum(starts, axis=1)),
        mtp_tokens=torch.from_numpy(mtp_tokens),
        mtp_targets=torch.from_numpy(mtp_targets),
    )
