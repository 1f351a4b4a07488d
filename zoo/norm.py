"""Normalisation of the last dimension."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config_mixer import NormConfig, NormKind, QKNormConfig, Scope


def norm(dim: int, config: NormConfig) -> "RMSNorm | LayerNorm | BareNorm":
    """The normalisation of vectors of ``dim`` numbers that a config asks for."""
    if config.kind is NormKind.layer:
        return LayerNorm(dim, config)
    return RMSNorm(dim, config) if config.kind is NormKind.rms else BareNorm(config)


def heads_norm(config: QKNormConfig, *, n_heads: int, head_dim: int) -> "RMSNorm | LayerNorm | BareNorm":
    """The normalisation of ``n_heads`` queries or keys of a token: as (…, H·K) for scope width, else as (…, H, K)."""
    if config.scope is Scope.own:
        return LayerNorm((n_heads, head_dim), config)
    return norm(n_heads * head_dim if config.scope is Scope.width else head_dim, config)


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one, then multiply by a weight. Source: arXiv 1910.07467.

    The mean is taken in at least fp32. The result is cast back before the weight multiplies it, as Llama, Qwen3 and
    DeepSeek do, or after it (``late_cast``), as OLMo 2, Gemma 3 and gpt-oss do.
    """

    def __init__(self, dim: int, config: NormConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.offset, self.late_cast = config.eps, config.offset, config.late_cast

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.offset, self.late_cast)


class LayerNorm(nn.Module):
    """Scale each vector to mean zero and variance one, times a weight, plus a bias. Source: arXiv 1607.06450.

    Weight and bias have the shape of the vector, or (H, K), where each of H vectors has its own (Chameleon).
    """

    def __init__(self, shape: int | tuple[int, int], config: NormConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape))
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if weight.dim() == 1:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), weight)


class BareNorm(nn.Module):
    """Scale each vector to a root mean square of one (Llama 4 Scout: queries and keys)."""

    def __init__(self, config: NormConfig) -> None:
        super().__init__()
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return _RMSNorm.apply(x, None, self.eps, 0.0, False)


class _RMSNorm(torch.autograd.Function):
    """One node that keeps only the input and a scale a vector; on a CPU 2.7 times as fast as its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, late_cast: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        h = x.to(wide)
        y = h.square()
        scale = y.mean(-1, keepdim=True).add_(eps).rsqrt_()  # (…, 1); bit for bit that of transformers
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        if torch.compiler.is_compiling():  # torch.compile cannot write to what may be no contiguous tensor
            y = h * scale
        else:
            torch.mul(h, scale, out=y)
        if weight is None:
            return y.to(x.dtype)
        if late_cast:
            return y.mul_(multiplier(weight, offset, x.dtype, wide)).to(x.dtype)
        return y.to(x.dtype).mul_(multiplier(weight, offset, x.dtype, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        dim, wide = x.shape[-1], scale.dtype
        flat, grad, scales = x.reshape(-1, dim).to(wide), grads[0].reshape(-1, dim).to(wide), scale.reshape(-1, 1)
        both = grad * flat
        if weight is None:
            pull, d_weight, d_x = both.sum(-1, keepdim=True), None, grad * scales
        else:
            w = multiplier(weight, ctx.offset, x.dtype, wide)
            d_weight = torch.mv(both.t(), scales[:, 0]).to(weight.dtype)
            pull = torch.mv(both, w)[:, None]  # along x, from the mean square
            d_x = torch.mul(grad, w, out=both).mul_(scales)
        d_x.addcmul_(flat, pull.mul_(scales.pow(3)).div_(-dim))
        return d_x.to(x.dtype).view(x.shape), d_weight, None, None, None


def multiplier(weight: Tensor, offset: float, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """What multiplies: the weight rounded to ``dtype``, as a plan that gathers it so sees it, widened, plus offset."""
    w = weight.to(dtype).to(wide)
    return w + offset if offset else w
