"""Gated DeltaNet where a rank has some tokens of each row: its memory is of whole rows, and so shared by heads."""

import torch
from torch import Tensor

from parallel.comm import Lane
from parallel.context import to_own, to_rows
from zoo.context import Context
from zoo.deltanet import DeltaNet


class RowDeltaNet(DeltaNet):
    """Projects own tokens, convolves and remembers whole rows of some heads.

    Rank r has the r-th of n equal runs of query and key heads and of value heads, with their filters and decays.
    """

    lane: Lane

    def _remembered(
        self, q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor, context: Context, *, part: int = 0, parts: int = 1
    ) -> Tensor:
        """As a ``DeltaNet``, of own tokens: (B, T/n, …) (two all-to-alls over cp, and two in the backward)."""
        assert parts == 1, f"{part=} {parts=}"
        n, rank = self.lane.size, self.lane.rank
        shares = [each.unflatten(-1, (n, -1)) for each in (q, k, v, b, a)]  # (B, T/n, n, width/n)
        rows = to_rows(torch.cat(shares, dim=-1), self.lane)  # (B, T, all widths/n)
        q, k, v, b, a = rows.split([share.shape[-1] for share in shares], dim=-1)
        y = super()._remembered(q, k, v, b, a, context, part=rank, parts=n)  # (B, T, H/n, V)
        return to_own(y.flatten(2), self.lane).unflatten(-1, (-1, y.shape[-1])).flatten(2, 3)  # (B, T/n, H, V)
