"""Who may attend to whom, as data; each kernel renders it in its own way."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Mask:
    """Causal attention that stays within documents.

    Attributes:
        documents: (B, T), a number that differs between the documents of a row; None: each row is one document.
    """

    documents: Tensor | None

    @cached_property
    def dense(self) -> Tensor | None:
        """(B, 1, T, T), true where a query (row) may see a key (column); None: plain causal.

        Example: documents 0 0 1 1 1 allow

            1 . . . .
            1 1 . . .
            . . 1 . .
            . . 1 1 .
            . . 1 1 1
        """
        if self.documents is None:
            return None
        same = self.documents[:, None, :, None] == self.documents[:, None, None, :]
        return same & torch.ones_like(same[0, 0]).tril()
