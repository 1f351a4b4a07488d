"""The short causal convolution over tokens, one filter a channel, that Gated DeltaNet has behind its projections."""

from typing import Any

import torch
from torch import Tensor, nn


class Convolution(nn.Module):
    """Each token becomes a weighted sum of itself and of the ones just before it in its document.

    The weight is (channels, taps); its last tap is a token's own, as in transformers' and torch's convolutions. Before
    a document's first token there are zeros.

    Example: taps (a, b) over the numbers 1 2 3 | 4 5 of two documents give b, a+2b, 2a+3b | 4b, 4a+5b.
    """

    def __init__(self, channels: int, *, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))

    def forward(self, x: Tensor, *, documents: Tensor | None, part: int = 0, parts: int = 1) -> Tensor:
        """Map (B, T, channels) to the same.

        Args:
            x: what is filtered; with several ``parts``, one of that many equal runs of channels.
            documents: (B, T), which differ between the documents of a row; None: each row is one.
            part: which run, from 0.
            parts: how many runs.
        """
        return _Convolution.apply(x, self.weight.chunk(parts)[part], documents)


class _Convolution(torch.autograd.Function):
    """Shifted sums in place: (4, 512, 512) by 4 taps, forward and backward, 12 ms against 41 by ``conv1d``, one core.

    Sums are of at least fp32; the weight is rounded to the input's dtype first, as a plan that gathers it so sees it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, documents)
        w = _taps(weight, x.dtype)
        y = x * w[0]
        for shift in _shifts(x, w):
            y[:, shift:].addcmul_(_before(x, shift, documents), w[shift])
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, documents = ctx.saved_tensors
        w = _taps(weight, x.dtype)
        grad = grads[0].to(w.dtype)
        d_x, d_w = grad * w[0], torch.zeros_like(w)
        d_w[0] = (grad * x).sum((0, 1))
        for shift in _shifts(x, w):
            pull = grad[:, shift:]
            d_w[shift] = (pull * _before(x, shift, documents)).sum((0, 1))
            if documents is not None:
                pull = pull * _same(documents, shift)
            d_x[:, :-shift].addcmul_(pull, w[shift])
        return d_x.to(x.dtype), d_w.flip(0).t().to(weight.dtype), None


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(taps, channels), a token's own first, rounded to ``dtype``, in at least fp32."""
    return weight.to(dtype).to(torch.promote_types(dtype, torch.float32)).flip(1).t().contiguous()


def _shifts(x: Tensor, w: Tensor) -> range:
    """How far back there can be a token: rows may be shorter than the filters."""
    return range(1, min(len(w), x.shape[1]))


def _before(x: Tensor, shift: int, documents: Tensor | None) -> Tensor:
    """For each token but the first ``shift``, the one that many before, zeros if of another document."""
    earlier = x[:, :-shift]
    return earlier if documents is None else earlier * _same(documents, shift)


def _same(documents: Tensor, shift: int) -> Tensor:
    """(B, T − shift, 1), whether a token's document is that of the token ``shift`` before it."""
    return (documents[:, shift:] == documents[:, :-shift])[..., None]
