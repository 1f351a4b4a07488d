"""Grok 2.5 from its published formulas, one line each: ``from plain_grok import plain_grok``.

Transformers has no class of it. Written from sglang python/sglang/srt/models/grok.py and its triton attention, and
xai-org/grok-1 model.py; shares no code with ``zoo/``, takes its numbers from a config and its tensors by our names.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.config import ModelConfig
from zoo.config_ff import MoEConfig
from zoo.config_mixer import AttentionConfig


def plain_grok(config: ModelConfig, state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of ``tokens`` (B, T), in the dtype of ``state``; one document a row."""
    eps = config.norm.eps
    x = state["embed.weight"][tokens] * math.sqrt(config.d_model)
    for i, layer in enumerate(config.layers):
        assert layer.attention is not None and layer.moe is not None
        prefix = f"blocks.{i}."
        w = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        mixed = attention(rms(x, w["mixer_norm.weight"], eps), w, layer.attention)
        x = x + rms(mixed, w["mixer_post_norm.weight"], eps)
        h = rms(x, w["ff_norm.weight"], eps)
        both = (
            dense(h, w["mlp.gate.weight"], w["mlp.up.weight"], w["mlp.down.weight"]) + experts(h, w, layer.moe)
        ) / 2**0.5
        x = x + rms(both, w["ff_post_norm.weight"], eps)
    logits = rms(x, state["norm.weight"], eps) @ state["head.weight"].T * 0.5
    return capped(logits, config.logit_softcap)


def attention(x: Tensor, w: Mapping[str, Tensor], config: AttentionConfig) -> Tensor:
    """Scores scaled, then capped, then sharpened by the position of the query, then masked."""
    heads = [
        (x @ w[f"mixer.{name}.weight"].T).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for name in ("wq", "wk", "wv")
    ]
    assert config.rope is not None and config.temperature is not None
    q, k = rotated(heads[0], config.rope.theta), rotated(heads[1], config.rope.theta)
    v = heads[2]
    shared_by = config.n_heads // config.n_kv_heads
    k, v = k.repeat_interleave(shared_by, dim=1), v.repeat_interleave(shared_by, dim=1)

    scores = capped(q @ k.transpose(-1, -2) / math.sqrt(config.head_dim), config.softcap)  # (B, H, T, T)
    length, floor = x.shape[1], config.temperature.floor
    sharpen = [math.log2(p) / math.log2(floor) if p > floor else 1.0 for p in range(length)]
    scores = scores * torch.tensor(sharpen, dtype=x.dtype)[:, None]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v  # (B, H, T, K)
    return mixed.transpose(1, 2).flatten(-2) @ w["mixer.wo.weight"].T


def rotated(x: Tensor, theta: float) -> Tensor:
    """Turn (…, T, K): dimension i with dimension i + K/2, by position · θ^(−2i/K)."""
    half = x.shape[-1] // 2
    speed = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed  # (T, K/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """GELU-gated feed-forward, tanh form."""
    return (gelu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x: Tensor, w: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """Every expert on every token; weights of those not chosen are zero, those of the chosen do not add up to one."""
    likely = capped(x @ w["moe.router.weight"].T, config.router.softcap).softmax(dim=-1)  # (B, T, E)
    weights = torch.where(likely >= likely.topk(config.top_k).values[..., -1:], likely, 0)
    every = [
        dense(x, w["moe.experts.gate"][e], w["moe.experts.up"][e], w["moe.experts.down"][e])
        for e in range(config.n_experts)
    ]
    return (torch.stack(every, dim=-1) * weights[..., None, :]).sum(dim=-1)


def gelu(x: Tensor) -> Tensor:
    """Tanh form."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """To a root mean square of one, times a weight."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def capped(x: Tensor, cap: float | None) -> Tensor:
    """Between −cap and cap."""
    assert cap is not None
    return cap * torch.tanh(x / cap)
