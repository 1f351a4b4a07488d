"""Grouped-query attention. Source: arXiv 2305.13245; what fills its slots is named in zoo/config_mixer.py."""

import torch
from torch import Tensor, nn

from zoo.config_mixer import AttentionConfig, Scope, TemperatureKind
from zoo.context import Context
from zoo.kernel import Kernel
from zoo.linear import Linear
from zoo.norm import heads_norm
from zoo.temperature import sharpening


class Attention(nn.Module):
    """H query heads share G key-value heads."""

    def __init__(self, config: AttentionConfig, *, d_model: int) -> None:
        super().__init__()
        self.config = c = config
        self.wq = Linear(d_model, c.n_heads * c.head_dim, bias=c.bias)
        self.wk = Linear(d_model, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.wv = Linear(d_model, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.wo = Linear(c.n_heads * c.head_dim, d_model, bias=c.out_bias)
        self.wg = Linear(d_model, c.n_heads * c.head_dim) if c.gate else None
        self.q_norm = heads_norm(c.qk_norm, n_heads=c.n_heads, head_dim=c.head_dim) if c.qk_norm else None
        self.k_norm = heads_norm(c.qk_norm, n_heads=c.n_kv_heads, head_dim=c.head_dim) if c.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(c.n_heads)) if c.sinks else None
        ratio = c.temperature is not None and c.temperature.kind is TemperatureKind.ratio
        self.kernel = Kernel(
            scale=c.scale,
            width=c.head_dim,
            v_width=c.head_dim,
            softcap=c.softcap,
            temperature=c.temperature if ratio else None,
            has_sinks=c.sinks,
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix each token with those before it: (B, T, D), normalised, to (B, T, D)."""
        c = self.config
        q, k, v = self._inputs(x, context)
        if c.temperature is not None and c.temperature.kind is TemperatureKind.steps:
            wide = torch.promote_types(q.dtype, torch.float32)
            factors = sharpening(c.temperature, context.positions, dtype=wide)
            q = (q * factors[..., None, None]).to(q.dtype)
        sinks = None if self.sinks is None else self.sinks.to(x.dtype)
        y = self.kernel(q, k, v, context.mask(window=c.window, chunk=c.chunk), sinks=sinks).flatten(2)  # (B, T, H·K)
        if self.wg is not None:
            y = y * torch.sigmoid(self.wg(x))
        return self.wo(y)

    def _inputs(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K), normalised and turned."""
        c, (B, T, _) = self.config, x.shape
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        if c.qk_norm is not None and c.qk_norm.scope is Scope.width:
            q, k = self._normed(q, k)
        # -1: H and G are shares under tensor parallelism
        q, k, v = q.view(B, T, -1, c.head_dim), k.view(B, T, -1, c.head_dim), v.view(B, T, -1, c.head_dim)
        if c.qk_norm is not None and c.qk_norm.scope is not Scope.width and not c.qk_norm.after_rope:
            q, k = self._normed(q, k)
        if c.rope is not None:
            rotate = context.rotation(c.rope, dim=c.head_dim)
            q, k = rotate(q), rotate(k)
        if c.qk_norm is not None and c.qk_norm.after_rope:
            q, k = self._normed(q, k)
        return q, k, v

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None and self.k_norm is not None, f"{self.config.qk_norm=}"
        return self.q_norm(q), self.k_norm(k)
