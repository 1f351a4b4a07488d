"""Normalisation."""

import torch
from torch import Tensor, nn

from zoo.config import NormConfig


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one, then multiply by a weight. Source: arXiv 1910.07467.

    The mean is taken in at least fp32 and the result cast back before the weight multiplies it, as Llama, Qwen3 and
    DeepSeek do.
    """

    def __init__(self, dim: int, config: NormConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)
