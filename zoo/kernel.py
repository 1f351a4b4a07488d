"""softmax(QKᵀ)V behind one signature."""

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.linear import product_dtype
from zoo.mask import Mask


class Kernel(nn.Module):
    """Scaled dot-product attention by torch; a module, so that context parallelism can put another in its place."""

    def __init__(self, *, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attend.

        Args:
            q: (B, T, H, K).
            k: (B, T, G, K), where G divides H.
            v: (B, T, G, U); U need not be K.
            mask: who sees whom.

        Returns:
            (B, T, H, U).
        """
        width = v.shape[-1]
        if (
            width < q.shape[-1]
        ):  # torch's fused kernels want one width: padded zeros cost half of what its fallback does
            v = F.pad(v, (0, q.shape[-1] - width))
        narrow, wide = q.dtype, product_dtype(q.dtype, q.device.type)
        q, k, v = (each.to(wide).transpose(1, 2) for each in (q, k, v))
        allowed = mask.dense
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=self.scale, enable_gqa=grouped
        )
        return y.transpose(1, 2)[..., :width].to(narrow)
