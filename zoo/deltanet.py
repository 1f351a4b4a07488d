"""Gated DeltaNet: linear attention that writes by the delta rule and forgets by a learned decay.

Source: arXiv 2412.06464, with the output gate, the grouped value heads and the casts of Qwen3-Next (transformers,
models/qwen3_next/modeling_qwen3_next.py).
Letters: zoo/delta_rule.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import delta_fla
from zoo.config_mixer import DeltaNetConfig
from zoo.context import Context
from zoo.convolution import Convolution
from zoo.delta_rule import Rule, chunked
from zoo.linear import Linear
from zoo.norm import norm


class DeltaNet(nn.Module):
    """A mixer whose memory of all tokens so far is one matrix a value head; it needs no positions.

    Attributes:
        chosen: what computes the rule, set when a model is built for a device.
    """

    def __init__(self, config: DeltaNetConfig, *, d_model: int) -> None:
        super().__init__()
        self.config = c = config
        k_width, v_width = c.n_k_heads * c.k_dim, c.n_v_heads * c.v_dim
        self.wq, self.wk = Linear(d_model, k_width), Linear(d_model, k_width)
        self.wv, self.wg = Linear(d_model, v_width), Linear(d_model, v_width)
        self.wb, self.wa = Linear(d_model, c.n_v_heads), Linear(d_model, c.n_v_heads)
        self.conv_q, self.conv_k = Convolution(k_width, taps=c.conv), Convolution(k_width, taps=c.conv)
        self.conv_v = Convolution(v_width, taps=c.conv)
        self.log_decay = nn.Parameter(torch.empty(c.n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.n_v_heads))
        self.norm = norm(c.v_dim, c.norm)
        self.wo = Linear(v_width, d_model)
        self.chosen = Rule.torch

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix each token with those before it in its document: (B, T, D), normalised, to (B, T, D)."""
        y = self._remembered(self.wq(x), self.wk(x), self.wv(x), self.wb(x), self.wa(x), context)  # (B, T, H, V)
        gate = F.silu(self.wg(x).to(torch.promote_types(x.dtype, torch.float32))).view(y.shape)
        return self.wo((self.norm(y) * gate).to(x.dtype).flatten(2))

    def _remembered(
        self, q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor, context: Context, *, part: int = 0, parts: int = 1
    ) -> Tensor:
        """Convolve the projections of whole rows, and read the memory of them.

        Args:
            q: (B, T, G · K), of all heads, or of one of several equal runs of them.
            k: (B, T, G · K).
            v: (B, T, H · V).
            b: (B, T, H), the logit of a writing strength.
            a: (B, T, H), of which comes the decay.
            context: of the rows.
            part: which run of heads, from 0.
            parts: how many runs.

        Returns:
            (B, T, H, V), of the same heads.
        """
        c, mask, run = self.config, context.mask(), {"part": part, "parts": parts}
        documents = mask.pieces  # numbered anew: none twice in a row
        wide = torch.promote_types(q.dtype, torch.float32)
        q = F.silu(self.conv_q(q, documents=documents, **run)).unflatten(-1, (-1, c.k_dim))
        k = F.silu(self.conv_k(k, documents=documents, **run)).unflatten(-1, (-1, c.k_dim))  # (B, T, G, K)
        v = F.silu(self.conv_v(v, documents=documents, **run)).unflatten(-1, (-1, c.v_dim))  # (B, T, H, V)

        beta = b.to(wide).sigmoid()  # (B, T, H)
        log_decay, dt_bias = (
            each.chunk(parts)[part].to(a.dtype).to(wide) for each in (self.log_decay, self.dt_bias)
        )  # (H,)
        decay = -log_decay.exp() * F.softplus(a.to(wide) + dt_bias)  # (B, T, H)
        if self.chosen is Rule.fla:
            return delta_fla.chunked(q, k, v, beta=beta, decay=decay, ends=None if documents is None else mask.ends)
        return chunked(q, k, v, beta=beta, decay=decay, documents=documents)
