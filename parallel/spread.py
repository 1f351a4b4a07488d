"""A decoder, or a pipeline stage of one, whose ranks share rows: each computes with some of the tokens.

Context parallelism cuts first (head and tail of a row, parallel/context.py), then, between layers, tensor parallelism.
"""

import torch
from torch import Tensor

from parallel.comm import Lane
from parallel.context import RowContext, join_rows, own
from parallel.layout import Placed
from zoo.context import Context
from zoo.decoder import Decoder, Objective


class SharedDecoder(Decoder, Placed):
    """Takes whole rows, as a ``Decoder`` does; those that ranks cannot share evenly are made longer at their end.

    No token before it sees what was added there.

    Attributes:
        tp: the ranks that share layers; None: this one alone.
        cp: the ranks that share rows; None: this one alone.
    """

    tp: Lane | None
    cp: Lane | None

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        objective: Objective | None = None,
    ) -> Tensor:
        """Whole rows in, logits of whole rows or losses of own tokens out (activations over tp and cp)."""
        y = super().forward(tokens, positions=positions, documents=documents, objective=objective)
        alone = self.part.begins and self.part.ends
        return y[:, : tokens.shape[1]] if alone and objective is None else y

    def fitted(
        self, tokens: Tensor, positions: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of a ``Decoder``; longer where ranks cannot share that length."""
        tokens, positions, documents = super().fitted(tokens, positions, documents)
        lacking = -tokens.shape[1] % self._multiple
        if not lacking:
            return tokens, positions, documents
        return (
            _longer(tokens, lacking),
            _longer(positions, lacking),
            None if documents is None else _longer(documents, lacking),
        )

    def states(self, rows: int, length: int) -> torch.Size:
        """Shape of what a stage of this rank gives the next, for ``rows`` fitted rows."""
        ranks = (self.tp.size if self.tp else 1) * (self.cp.size if self.cp else 1)
        return super().states(rows, length // ranks)

    @property
    def _multiple(self) -> int:
        """Of which rows' length is to be one."""
        return (self.tp.size if self.tp else 1) * (2 * self.cp.size if self.cp else 1)

    def _own(self, x: Tensor, *, dim: int = 1) -> Tensor:
        return x if self.cp is None else own(x, self.cp, dim=dim)

    def _context(self, positions: Tensor, documents: Tensor | None, dtype: torch.dtype, rows: Tensor | None) -> Context:
        if self.cp is None:
            return super()._context(positions, documents, dtype, rows)
        return RowContext.cut(
            positions, documents, lane=self.cp, dtype=dtype, length=self.config.context, rows=rows
        )  # fmt: skip

    def _end(self, x: Tensor, context: Context, objective: Objective | None) -> Tensor:
        """As of a ``Decoder`` (logits: one all-gather over cp)."""
        y = super()._end(x, context, objective)
        return join_rows(y, self.cp) if objective is None and self.cp is not None else y


def _longer(x: Tensor, by: int) -> Tensor:
    """(B, T) with the last column repeated.

    Example: 5 7 9 longer by 2 is 5 7 9 9 9.
    """
    return torch.cat([x, x[:, -1:].expand(-1, by)], dim=1)
