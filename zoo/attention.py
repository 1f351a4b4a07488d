"""Grouped-query attention. Source: arXiv 2305.13245; QK-norm per head: Qwen3, arXiv 2505.09388, section 2."""

from torch import Tensor, nn

from zoo.config import AttentionConfig
from zoo.context import Context
from zoo.kernel import Kernel
from zoo.linear import Linear
from zoo.norm import RMSNorm


class Attention(nn.Module):
    """H query heads share G key-value heads."""

    def __init__(self, config: AttentionConfig, *, d_model: int) -> None:
        super().__init__()
        self.config = c = config
        self.wq = Linear(d_model, c.n_heads * c.head_dim)
        self.wk = Linear(d_model, c.n_kv_heads * c.head_dim)
        self.wv = Linear(d_model, c.n_kv_heads * c.head_dim)
        self.wo = Linear(c.n_heads * c.head_dim, d_model)
        self.q_norm = RMSNorm(c.head_dim, c.qk_norm) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.qk_norm) if c.qk_norm else None
        self.kernel = Kernel(scale=c.head_dim**-0.5)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix each token with those before it: (B, T, D), normalised, to (B, T, D)."""
        B, T, _ = x.shape
        rotate = context.rotation(self.config.rope, dim=self.config.head_dim)

        q = self.wq(x).view(B, T, -1, self.config.head_dim)  # (B, T, H, K); -1: H is a share under tensor parallelism
        k = self.wk(x).view(B, T, -1, self.config.head_dim)  # (B, T, G, K)
        v = self.wv(x).view(B, T, -1, self.config.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y = self.kernel(rotate(q), rotate(k), v, context.mask)  # (B, T, H, K)
        return self.wo(y.flatten(2))
