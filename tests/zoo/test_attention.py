"""Attention's slots, alone and together, against attention written out token by token."""

import math

import pytest
import torch

from zoo.attention import Attention
from zoo.config_mixer import (
    AttentionConfig,
    NormKind,
    QKNormConfig,
    RopeConfig,
    RopeScalingConfig,
    Scaling,
    Scope,
    TemperatureConfig,
    TemperatureKind,
)
from zoo.context import Context

D, H, G, K = 14, 4, 2, 8
SHAPE = {"n_heads": H, "n_kv_heads": G, "head_dim": K}
ROPE = RopeConfig(theta=50.0)
STEPS = TemperatureConfig(kind=TemperatureKind.steps, floor=3, scale=0.4)
RATIO = TemperatureConfig(kind=TemperatureKind.ratio, floor=3)
SLOTS = {
    "bare": {},
    "rope": {"rope": ROPE},
    "interleaved": {"rope": RopeConfig(theta=50.0, interleaved=True)},
    "fraction": {"rope": RopeConfig(theta=50.0, fraction=0.5)},
    "norm of heads": {"rope": ROPE, "qk_norm": QKNormConfig(eps=1e-2, offset=1.0, late_cast=True)},
    "norm of the width": {"rope": ROPE, "qk_norm": QKNormConfig(eps=1e-2, scope=Scope.width)},
    "norm of each head": {"rope": ROPE, "qk_norm": QKNormConfig(eps=1e-2, kind=NormKind.layer, scope=Scope.own)},
    "norm after rope": {"rope": ROPE, "qk_norm": QKNormConfig(eps=1e-2, kind=NormKind.bare, after_rope=True)},
    "norm without rope": {"qk_norm": QKNormConfig(eps=1e-2)},
    "bias": {"bias": True},
    "out_bias": {"out_bias": True},
    "window": {"window": 4},
    "chunk": {"chunk": 4},
    "scale": {"scale_dim": 3.5},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "gate": {"gate": True},
    "steps": {"temperature": STEPS},
    "ratio": {"temperature": RATIO, "softcap": 0.7},
    "many": {
        "rope": ROPE,
        "qk_norm": QKNormConfig(eps=1e-2),
        "bias": True,
        "out_bias": True,
        "window": 5,
        "softcap": 2.0,
        "sinks": True,
        "gate": True,
        "temperature": RATIO,
    },
}


def draw(config):
    """A layer in float64 with every number random."""
    torch.manual_seed(0)
    layer = Attention(config, d_model=D).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def context_of(row, *, rows=1, alone=False, dtype=torch.float64):
    """What layers share for rows with documents of these lengths."""
    positions = torch.tensor([[t for n in row for t in range(n)]] * rows)
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)]] * rows)
    return Context(positions, None if alone else documents, dtype, 64)


def normalised(x, module, config, h):
    """One head, or for the scope width all of them, (…, K)."""
    if config.kind is NormKind.layer:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + config.eps).sqrt()
        return x * module.weight[h] + module.bias[h]
    x = x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt()
    return x if config.kind is NormKind.bare else x * (module.weight + config.offset)


def turned(x, rope, positions):
    """The first dimensions of one head, (T, K), first of all pairs before second of all."""
    n = int(K * rope.fraction)
    a, b = (x[:, 0:n:2], x[:, 1:n:2]) if rope.interleaved else (x[:, : n // 2], x[:, n // 2 : n])
    angle = positions[:, None].double() * rope.theta ** (-torch.arange(0, n, 2).double() / n)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[:, n:]], dim=-1)


def written(layer, x, context):
    """The layer of one row, head by head, query by query."""
    c, positions, T = layer.config, context.positions[0], x.shape[1]
    documents = torch.zeros(T) if context.documents is None else context.documents[0]

    def project(linear):
        return x[0] @ linear.weight.T + (0 if linear.bias is None else linear.bias)

    def head_of(linear, module, h):
        flat = project(linear)
        if module is not None and c.qk_norm.scope is Scope.width:
            flat = normalised(flat, module, c.qk_norm, h)
        one = flat[:, h * K : (h + 1) * K]
        by_head = module is not None and c.qk_norm.scope is not Scope.width
        if by_head and not c.qk_norm.after_rope:
            one = normalised(one, module, c.qk_norm, h)
        if c.rope is not None:
            one = turned(one, c.rope, positions)
        return normalised(one, module, c.qk_norm, h) if by_head and c.qk_norm.after_rope else one

    heads = []
    for h in range(H):
        g = h // (H // G)
        q, k = head_of(layer.wq, layer.q_norm, h), head_of(layer.wk, layer.k_norm, g)
        v = project(layer.wv)[:, g * K : (g + 1) * K]
        rows = []
        for i in range(T):
            p = int(positions[i])
            query = q[i]
            if c.temperature is not None and c.temperature.kind is TemperatureKind.steps:
                query = query * (1 + c.temperature.scale * math.log(1 + (p + 1) // c.temperature.floor))
            seen = [
                j
                for j in range(i + 1)
                if documents[i] == documents[j]
                and (c.window is None or i - j < c.window)
                and (c.chunk is None or p // c.chunk == int(positions[j]) // c.chunk)
            ]
            scores = k[seen] @ query / (c.scale_dim or K) ** 0.5
            if c.softcap is not None:
                scores = c.softcap * (scores / c.softcap).tanh()
            if c.temperature is not None and c.temperature.kind is TemperatureKind.ratio and p > c.temperature.floor:
                scores = scores * math.log(p) / math.log(c.temperature.floor)
            total = scores.exp().sum() + (layer.sinks[h].exp() if c.sinks else 0)
            rows.append(scores.exp() @ v[seen] / total)
        heads.append(torch.stack(rows))
    y = torch.cat(heads, dim=-1)
    if c.gate:
        y = y * torch.sigmoid(project(layer.wg))
    return (y @ layer.wo.weight.T + (0 if layer.wo.bias is None else layer.wo.bias))[None]


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_attention_and_its_gradients_equal_attention_written_out(slots):
    layer = draw(AttentionConfig(**SHAPE, **slots))
    x = torch.randn(1, 14, D, dtype=torch.float64, requires_grad=True)
    context = context_of([9, 5])
    got, want = layer(x, context), written(layer, x, context)
    error = {"rtol": 1e-5, "atol": 1e-6} if "rope" in slots else {"rtol": 1e-11, "atol": 1e-11}  # fp32 frequencies
    torch.testing.assert_close(got, want, **error)
    inputs, pull = [x, *layer.parameters()], torch.randn_like(want)
    mine, exact = torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull)
    for each, other in zip(mine, exact, strict=True):
        torch.testing.assert_close(each, other, rtol=error["rtol"], atol=10 * error["atol"])


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_packed_documents_equal_separate_ones(slots):
    layer = draw(AttentionConfig(**SHAPE, **slots))
    x = torch.randn(2, 14, D, dtype=torch.float64)
    packed = layer(x, context_of([9, 5], rows=2))
    first = layer(x[:, :9], context_of([9], rows=2, alone=True))
    second = layer(x[:, 9:], context_of([5], rows=2, alone=True))
    torch.testing.assert_close(packed, torch.cat([first, second], dim=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_bf16_stays_bf16_and_near_the_exact_result(slots):
    layer = draw(AttentionConfig(**SHAPE, **slots))
    x = torch.randn(1, 14, D)
    want = layer(x.bfloat16().double(), context_of([9, 5]))
    got = layer.float()(x.bfloat16(), context_of([9, 5], dtype=torch.bfloat16))  # weights of fp32, as unspread models
    assert got.dtype is torch.bfloat16
    assert (got.double() - want).norm() <= 3e-2 * want.norm()


def test_parameters_have_the_names_and_shapes_that_tables_match_on():
    norm = QKNormConfig(eps=1e-6, kind=NormKind.layer, scope=Scope.own)
    config = AttentionConfig(**SHAPE, qk_norm=norm, bias=True, out_bias=True, sinks=True, gate=True)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Attention(config, d_model=D).state_dict().items()}
    assert shapes == {
        "sinks": (H,),
        "wq.weight": (H * K, D),
        "wq.bias": (H * K,),
        "wk.weight": (G * K, D),
        "wk.bias": (G * K,),
        "wv.weight": (G * K, D),
        "wv.bias": (G * K,),
        "wo.weight": (D, H * K),
        "wo.bias": (D,),
        "wg.weight": (H * K, D),
        "q_norm.weight": (H, K),
        "q_norm.bias": (H, K),
        "k_norm.weight": (G, K),
        "k_norm.bias": (G, K),
    }


def test_what_no_family_does_is_refused_by_its_key():
    with pytest.raises(ValueError, match="qk_norm.after_rope=True: must be false unless kind is bare"):
        QKNormConfig(eps=1e-6, after_rope=True)
    scaling = RopeScalingConfig(kind=Scaling.yarn, factor=4, original_context=16, low=1, high=32)
    with pytest.raises(ValueError, match="attention.rope.scaling.mscale_all_dim=1.0: must be 0"):
        AttentionConfig(**SHAPE, rope=RopeConfig(theta=100.0, scaling=scaling))
