"""Rotary positions: each pair of dimensions turns by an angle that grows with the position.

Source: arXiv 2104.09864; scaling for longer contexts: Llama 3.1 (github meta-llama/llama-models, apply_scaling) and
YaRN (arXiv 2309.00071), with DeepSeek-V3's use of it (github deepseek-ai/DeepSeek-V3, inference/model.py).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.config_mixer import RopeConfig, RopeScalingConfig, Scaling


@dataclass
class Rotation:
    """Cosines and sines of the positions of one batch, (B, T, 1, R/2) for R rotated dimensions."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate the first R dimensions of (B, T, H, K); the others pass.

        Example with R = 4, K = 6: halves apart, the pairs are (0, 2) and (1, 3); interleaved, (0, 1) and (2, 3); 4 and
        5 stay. Either way the first of all pairs come out before the second of all: queries and keys share an order,
        and their product does not mind which.
        """
        return _Rotate.apply(x, self.cos, self.sin, self.interleaved)


class _Rotate(torch.autograd.Function):
    """The rotation into one new tensor; as products and a concatenation it is 1.6 times slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        out, turning = torch.empty(x.shape, dtype=x.dtype, device=x.device), 2 * cos.shape[-1]
        _turn(_pairs(x[..., :turning], interleaved=interleaved), out[..., :turning].chunk(2, dim=-1), cos, sin)
        if turning < x.shape[-1]:
            out[..., turning:] = x[..., turning:]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad, turning = grads[0], 2 * cos.shape[-1]
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        back = _pairs(out[..., :turning], interleaved=ctx.interleaved)
        _turn(grad[..., :turning].chunk(2, dim=-1), back, cos, sin.neg())  # back by the angle
        if turning < grad.shape[-1]:
            out[..., turning:] = grad[..., turning:]
        return out, None, None, None


def _pairs(x: Tensor, *, interleaved: bool) -> tuple[Tensor, ...]:
    """Views of the first and of the second of all pairs."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def _turn(pairs: tuple[Tensor, ...], out: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> None:
    """Write the rotated pairs to ``out``."""
    if torch.compiler.is_compiling():  # torch.compile cannot write products to views, and makes one pass of this
        out[0].copy_(pairs[0] * cos - pairs[1] * sin)
        out[1].copy_(pairs[1] * cos + pairs[0] * sin)
        return
    torch.mul(pairs[0], cos, out=out[0]).addcmul_(pairs[1], sin, value=-1)
    torch.mul(pairs[1], cos, out=out[1]).addcmul_(pairs[0], sin)


def rotation(config: RopeConfig, *, positions: Tensor, dim: int, context: int, dtype: torch.dtype) -> Rotation:
    """Angles in at least fp32, their cosines and sines in ``dtype``.

    Args:
        config: the rotary part of a mixer.
        positions: (B, T), counted from the start of each document.
        dim: dimensions of a head, of which the first ``config.turning(dim)`` turn.
        context: tokens the model is configured for; decides whether YaRN acts.
        dtype: of the activations.
    """
    wide = torch.promote_types(dtype, torch.float32)
    turns = frequencies(config, dim=dim, context=context, device=positions.device).to(wide)
    angles = positions[..., None, None].to(wide) * turns  # (B, T, 1, R/2)
    factor = phase_factor(config, context=context)
    return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype), config.interleaved)


def frequencies(config: RopeConfig, *, dim: int, context: int, device: torch.device) -> Tensor:
    """Radians a position, one for each pair of a head of ``dim`` dimensions that turns, in fp32.

    Made anew each time: a buffer would be lost when a meta model is emptied. Written as the published codes are, so
    that even the rounding is theirs: an angle is a frequency's rounding error times the position.
    """
    turning = config.turning(dim)
    periods = config.theta ** (torch.arange(0, turning, 2, device=device, dtype=torch.float32) / turning)
    scaling = acting(config, context=context)
    if scaling is None:
        return 1.0 / periods
    if scaling.kind is Scaling.linear:
        return 1.0 / periods / scaling.factor
    if scaling.kind is Scaling.llama3:
        return _llama3(1.0 / periods, scaling)
    return _yarn(periods, scaling, dim=turning, theta=config.theta)


def acting(config: RopeConfig, *, context: int) -> RopeScalingConfig | None:
    """The scaling in force. YaRN acts only when the context exceeds the original one, which is DeepSeek's own rule."""
    scaling = config.scaling
    if scaling is not None and scaling.kind is Scaling.yarn and context <= _trained(scaling):
        return None
    return scaling


def softmax_factor(config: RopeConfig, *, context: int) -> float:
    """What multiplies the softmax scale: the square of YaRN's temperature (1.873854 for DeepSeek-V3), or 1."""
    scaling = acting(config, context=context)
    if scaling is None or scaling.kind is not Scaling.yarn:
        return 1.0
    return _temperature(scaling.factor, scaling.mscale_all_dim) ** 2


def phase_factor(config: RopeConfig, *, context: int) -> float:
    """What multiplies cosines and sines under YaRN.

    1 for DeepSeek-V3, whose two mscales are equal; 1.346574 for gpt-oss, whose softmax scale carries none of it.
    """
    scaling = acting(config, context=context)
    if scaling is None or scaling.kind is not Scaling.yarn:
        return 1.0
    return _temperature(scaling.factor, scaling.mscale) / _temperature(scaling.factor, scaling.mscale_all_dim)


def _temperature(factor: float, mscale: float) -> float:
    """YaRN, equation 22: 0.1 ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _trained(scaling: RopeScalingConfig) -> int:
    assert scaling.original_context is not None, f"{scaling=}"
    return scaling.original_context


def _llama3(plain: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Slow turns are divided by ``factor``, fast ones kept, those between blended."""
    assert scaling.low is not None and scaling.high is not None, f"{scaling=}"
    cycles = _trained(scaling) / (2 * math.pi / plain)  # turns within the original context
    if scaling.high == scaling.low:
        return torch.where(cycles < scaling.low, plain / scaling.factor, plain)
    keep = ((cycles - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(periods: Tensor, scaling: RopeScalingConfig, *, dim: int, theta: float) -> Tensor:
    """Pairs that turn more than ``high`` times in the original context are kept, fewer than ``low`` divided.

    Between the two they blend; with low = high, as in Kimi K2, the bounds are neighbours and nothing blends.
    """
    assert scaling.low is not None and scaling.high is not None, f"{scaling=}"

    def pair_turning(times: float) -> float:
        return dim * math.log(_trained(scaling) / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(scaling.high), pair_turning(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    pairs = torch.arange(dim // 2, device=periods.device, dtype=periods.dtype)
    keep = 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - keep) + 1.0 / periods * keep
