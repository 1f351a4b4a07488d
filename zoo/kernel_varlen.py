"""Attention by flash attention over documents laid end to end, on CUDA in bf16 and fp16. arXiv 2307.08691."""

from torch import Tensor

from zoo.mask import Mask
from zoo.section import Section


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: Mask | Section, *, scale: float) -> Tensor:
    """Attend; shapes and arguments as in ``zoo.kernel_plain.plain``. Documents and chunks are sequences of their own.

    Where a sequence has fewer queries than keys they are its last ones, as flash attention takes them.
    Where a row holds several documents the host waits, once a forward and kind of mask, to learn how many there are.
    """
    from torch.nn.attention.varlen import varlen_attn  # 2.5 s: it loads the compiler

    # Window (left, right): keys before and after the query's own; (-1, 0) is all before.
    window = (-1 if mask.window is None else mask.window - 1, 0)
    y = varlen_attn(
        q.flatten(0, 1).contiguous(),
        k.flatten(0, 1).contiguous(),
        v.flatten(0, 1).contiguous(),
        mask.ends,
        mask.key_ends,
        mask.longest,
        mask.key_longest,
        scale=scale,
        window_size=window,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    assert isinstance(y, Tensor), f"{type(y)=}"
    return y.view(q.shape)
