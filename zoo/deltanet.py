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
        c, (B, T, _), mask = self.config, x.shape, context.mask()
        documents = mask.pieces  # numbered anew: none twice in a row
        wide = torch.promote_types(x.dtype, torch.float32)
        q = F.silu(self.conv_q(self.wq(x), documents=documents)).view(B, T, -1, c.k_dim)  # -1: G is a share under TP
        k = F.silu(self.conv_k(self.wk(x), documents=documents)).view(B, T, -1, c.k_dim)  # (B, T, G, K)
        v = F.silu(self.conv_v(self.wv(x), documents=documents)).view(B, T, -1, c.v_dim)  # (B, T, H, V)

        beta = self.wb(x).to(wide).sigmoid()  # (B, T, H)
        log_decay, dt_bias = (each.to(x.dtype).to(wide) for each in (self.log_decay, self.dt_bias))
        decay = -log_decay.exp() * F.softplus(self.wa(x).to(wide) + dt_bias)  # (B, T, H)
        if self.chosen is Rule.fla:
            y = delta_fla.chunked(q, k, v, beta=beta, decay=decay, ends=None if documents is None else mask.ends)
        else:
            y = chunked(q, k, v, beta=beta, decay=decay, documents=documents)

        gate = F.silu(self.wg(x).to(wide)).view(y.shape)
        return self.wo((self.norm(y) * gate).to(x.dtype).flatten(2))
