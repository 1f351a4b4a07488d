"""Attention by torch's flex attention, compiled on CUDA: any mask and slot in one fused kernel. arXiv 2412.05496."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.mask import Mask
from zoo.section import Section


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Section,
    *,
    scale: float,
    softcap: float | None = None,
    factors: Tensor | None = None,
    sinks: Tensor | None = None,
    tells: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend; all as in ``zoo.kernel_plain.plain``. On a CPU forward only, without compiling."""
    from torch.nn.attention.flex_attention import AuxRequest  # 2.5 s: it loads the compiler

    y, more = attention(compiled=q.device.type == "cuda")(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=_modified(softcap, factors),
        block_mask=mask.blocks,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=sinks is not None, max_scores=tells),
    )
    if sinks is not None:
        # A sink adds its exponential to the denominator: y shrinks by e^lse / (e^lse + e^sink).
        kept = torch.sigmoid(more.lse - sinks.to(more.lse.dtype)[:, None])
        y = (y * kept[..., None]).to(q.dtype)
    return y.transpose(1, 2), more.max_scores.detach().amax(dim=(0, 2)) if tells else None


@cache
def attention(*, compiled: bool) -> Callable[..., Any]:
    """Torch's function; compiled once for each combination of slots, and once more if lengths vary, for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Any] = flex_attention
    return torch.compile(attend) if compiled else attend


def _modified(softcap: float | None, factors: Tensor | None) -> Callable[..., Tensor] | None:
    """What becomes of a score between scaling and mask, as flex attention asks for it: on scalar tensors."""
    if softcap is None and factors is None:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if factors is None else score * factors[b, query]

    return modified
