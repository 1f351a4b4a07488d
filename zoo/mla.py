"""Multi-head latent attention (MLA): keys and values unfold from one narrow latent per token.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Unchanged in DeepSeek-V3.
Letters: zoo/__init__.py, and here N nope_dim, R rope_dim, U v_dim, C kv_rank.
"""

import torch
from torch import Tensor, nn

from zoo.config_mixer import MLAConfig
from zoo.context import Context
from zoo.kernel import Kernel
from zoo.linear import Linear
from zoo.norm import norm
from zoo.rope import softmax_factor


class MLA(nn.Module):
    """Causal attention whose cache holds C + R numbers a token instead of 2 H K.

    Each head's query and key is a part without position (N) beside a rotated part (R);
    the rotated key is computed once and shared by all heads.
    """

    def __init__(self, config: MLAConfig, *, d_model: int, context: int) -> None:
        super().__init__()
        self.config = c = config
        width = c.nope_dim + c.rope_dim
        self.wq_down = None if c.q_rank is None else Linear(d_model, c.q_rank)
        self.q_norm = None if c.q_rank is None else norm(c.q_rank, c.norm)
        self.wq = Linear(d_model if c.q_rank is None else c.q_rank, c.n_heads * width)
        self.wkv_down = Linear(d_model, c.kv_rank + c.rope_dim)
        self.kv_norm = norm(c.kv_rank, c.norm)
        self.wkv = Linear(c.kv_rank, c.n_heads * (c.nope_dim + c.v_dim))
        self.wo = Linear(c.n_heads * c.v_dim, d_model)
        scale = width**-0.5 * softmax_factor(c.rope, context=context)
        self.kernel = Kernel(scale=scale, width=width, v_width=c.v_dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix each token with those before it: (B, T, D), normalised, to (B, T, D)."""
        c, (B, T, _) = self.config, x.shape
        rotate = context.rotation(c.rope, dim=c.rope_dim)

        latent = x if self.wq_down is None or self.q_norm is None else self.q_norm(self.wq_down(x))
        q = self.wq(latent).view(B, T, -1, c.nope_dim + c.rope_dim)  # (B, T, H, N+R); -1: H is a share under TP
        q_nope, q_rope = q.split([c.nope_dim, c.rope_dim], dim=-1)

        latent, k_rope = self._latent(x, context)  # (B, T, C), (B, T, R)
        kv = self.wkv(latent).unflatten(-1, (-1, c.nope_dim + c.v_dim))  # (B, T, H, N+U)
        k_nope, v = kv.split([c.nope_dim, c.v_dim], dim=-1)

        q = torch.cat([q_nope, rotate(q_rope)], dim=-1)
        k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, q.shape[2], -1)], dim=-1)  # (B, T, H, N+R)
        y = self.kernel(q, k, v, context.mask())  # (B, T, H, U)
        return self.wo(y.flatten(2))

    def _latent(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What a cache would hold of each token: a latent (B, T, C), normalised, and a rotated key part (B, T, R)."""
        c = self.config
        latent, k_rope = self.wkv_down(x).split([c.kv_rank, c.rope_dim], dim=-1)
        return self.kv_norm(latent), context.rotation(c.rope, dim=c.rope_dim)(k_rope[:, :, None])[:, :, 0]
