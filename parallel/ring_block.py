"""Attention of a block of queries to a block of keys that also gives the logarithm of its denominators.

torch's fused kernels behind two functions: ``aten``'s operators, which ``scaled_dot_product_attention`` is made of and
which, unlike it, return that logarithm. The one for CPUs is what tests run; those for CUDA, flash attention without a
mask in bf16 and fp16 and the memory-efficient kernel for the rest, were written against their schemas and never run.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.linear import product_dtype

HIDDEN = -1e30
"""What is added to a hidden score. Finite: a query that sees nothing of a block then has a tiny denominator in it, and
no weight when blocks are merged, where kernels make NaN of minus infinity less itself."""


@dataclass(frozen=True)
class Seen:
    """What queries of a block see of its keys, for ``zoo.kernel_max``; arguments as those of ``attend``.

    Attributes:
        n_keys: of the block.
        causal: as there.
        mask: as there.
        device: of the result.
    """

    n_keys: int
    causal: bool
    mask: Tensor | None
    device: torch.device

    def reach(self, queries: range) -> range:
        """The keys that some of these queries may see."""
        return range(queries.stop if self.causal else self.n_keys)

    def part(self, *, queries: range, keys: range) -> Tensor:
        """(B or 1, 1, queries, keys), true where a query sees a key."""
        if self.mask is not None:
            return self.mask[..., queries.start : queries.stop, keys.start : keys.stop]
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool, device=self.device)
        return (seen.tril(queries.start) if self.causal else seen)[None, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within a block.

    Args:
        q: (B, H, M, K).
        k: (B, G, N, K), where G divides H.
        v: (B, G, N, U); U is at most K.
        causal: whether the i-th query sees keys up to the i-th, all else being visible.
        mask: (B or 1, 1, M, N), true where a query sees a key; only without ``causal``.
        scale: of the scores.

    Returns:
        (B, H, M, U) and (B, H, M), both of at least fp32.
    """
    queries, keys, values, bias = _prepared(q, k, v, mask)
    if q.device.type == "cpu":
        y, denominator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif _is_flash(queries, bias):
        y, denominator, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, causal, False, scale=scale
        )
    else:
        y, denominator, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            queries, keys, values, bias, True, 0.0, causal, scale=scale
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    return y[..., : v.shape[-1]].to(wide), denominator[..., : q.shape[2]].to(wide)  # the last kernel pads to 32


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    denominator: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block adds to the gradients of queries, keys and values.

    Args:
        grad: (B, H, M, U), of the merged result.
        q: as in ``attend``.
        k: as there.
        v: as there.
        y: (B, H, M, U), the result merged of all blocks.
        denominator: (B, H, M), its logarithm, of all blocks: so weights are those of the whole.
        causal: as there.
        mask: as there.
        scale: as there.
    """
    queries, keys, values, bias = _prepared(q, k, v, mask)
    grad, y = (_padded(each, q.shape[-1]).to(queries.dtype) for each in (grad, y))
    if q.device.type == "cpu":
        denominator = denominator.to(torch.promote_types(queries.dtype, torch.float32))
        pulls = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, queries, keys, values, y, denominator, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif _is_flash(queries, bias):
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a random number generator
        pulls = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, queries, keys, values, y, denominator.float(), None, None, q.shape[2], k.shape[2], 0.0, causal,
            unused, unused, scale=scale,
        )  # fmt: skip
    else:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        denominator = F.pad(denominator.float(), (0, -denominator.shape[-1] % 32))
        *pulls, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, queries, keys, values, bias, y, denominator, unused, unused, 0.0, [True, True, True, False], causal,
            scale=scale,
        )  # fmt: skip
    d_q, d_k, d_v = pulls
    return d_q, _summed(d_k, k.shape[1]), _summed(d_v, k.shape[1])[..., : v.shape[-1]]


def _prepared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What kernels take: as many heads of keys as of queries, values as wide as keys, and numbers to add to scores."""
    wide, times = product_dtype(q.dtype, q.device.type), q.shape[1] // k.shape[1]
    q, k, v = (each.to(wide) for each in (q, k, _padded(v, k.shape[-1])))
    k, v = (each.repeat_interleave(times, dim=1) if times > 1 else each for each in (k, v))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=wide, device=q.device).masked_fill_(~mask, HIDDEN)
        if q.device.type != "cpu":
            bias = bias.expand(*q.shape[:2], -1, -1)
    return q, k, v, bias


def _is_flash(q: Tensor, bias: Tensor | None) -> bool:
    return bias is None and q.dtype in (torch.bfloat16, torch.float16)


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))


def _summed(x: Tensor, heads: int) -> Tensor:
    """(B, H, N, K) summed over query heads that share a key head: (B, G, N, K)."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
