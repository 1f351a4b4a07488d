"""An architecture in words: its layers in order, its attention, its feed-forward, its norms, each in one line."""

from itertools import groupby

from zoo.config import BlockConfig, ModelConfig
from zoo.config_ff import BatchScope, MLPConfig, MoEConfig, RouterConfig
from zoo.config_mixer import (
    AttentionConfig,
    DeltaNetConfig,
    MLAConfig,
    NormConfig,
    QKNormConfig,
    RopeConfig,
    Scaling,
    TemperatureConfig,
)


def pattern(config: ModelConfig) -> str:
    """The kinds of the layers, repeats counted.

    Example: prefix [a], cycle [b, b, c], nine layers are ``a, 2 x (2 b, c), 2 b``.
    """
    rest = config.n_layers - len(config.prefix)
    turns, left = divmod(rest, len(config.cycle))
    parts = [_runs(config.prefix)] if config.prefix else []
    if len(set(config.cycle)) == 1:
        parts += [_runs(config.cycle * turns)] * bool(turns)
    elif turns:
        parts.append(f"{turns} x ({_runs(config.cycle)})")
    if left:
        parts.append(_runs(config.cycle[:left]))
    return ", ".join(parts)


def dimensions(config: ModelConfig) -> str:
    """The sizes that a table of architectures gives."""
    parts = [f"{config.n_layers} layers", f"{config.d_model:,} wide", f"vocabulary {config.vocab_size:,}"]
    return ", ".join([*parts, f"context {config.context:,}"])


def mixer(layer: BlockConfig) -> str:
    """What mixes the tokens of a layer."""
    if layer.mla is not None:
        return _mla(layer.mla)
    if layer.deltanet is not None:
        return _deltanet(layer.deltanet)
    assert layer.attention is not None, f"{layer=}"
    return _attention(layer.attention)


def feed_forward(layer: BlockConfig) -> str:
    """What works on each token alone in a layer."""
    parts = [_mlp(layer.mlp)] if layer.mlp is not None else []
    if layer.moe is not None:
        parts.append(_moe(layer.moe))
    scaled = "" if layer.ff_scale == 1 else f"{layer.ff_scale:.4g} times the sum of "
    return scaled + " and ".join(parts)


def placement(layer: BlockConfig) -> str:
    """Where a layer has norms."""
    places = {(True, False): "before", (False, True): "after", (True, True): "before and after"}
    return f"{places.get((layer.pre_norm, layer.post_norm), 'nowhere')} mixer and feed-forward"


def norm(config: NormConfig) -> str:
    """A normalisation."""
    names = {"rms": "RMSNorm", "layer": "LayerNorm with bias", "bare": "RMSNorm without weight"}
    parts = [f"{names[config.kind]}, eps {config.eps:.3g}"]
    parts += ["weight is a deviation from one"] * bool(config.offset)
    parts += ["weight multiplies in fp32"] * config.late_cast
    return ", ".join(parts)


def around(config: ModelConfig) -> str:
    """What stands before and after the layers."""
    parts = ["learned positions"] * config.learned_positions
    parts += ["embeddings times the root of the width"] * config.scale_embed
    parts.append("embedding and head are one matrix" if config.tied else "embedding and head are two matrices")
    parts += [f"logits times {config.logit_scale:g}"] * (config.logit_scale != 1)
    if config.logit_softcap is not None:
        parts.append(f"logits capped at {config.logit_softcap:g}")
    parts += [f"{config.n_mtp} module{'s' * (config.n_mtp > 1)} of multi-token prediction"] * bool(config.n_mtp)
    return ", ".join(parts)


def _runs(kinds: list[str]) -> str:
    counted = [(len(list(same)), kind) for kind, same in groupby(kinds)]
    return ", ".join(f"{count} {kind}" if count > 1 else kind for count, kind in counted)


def _attention(a: AttentionConfig) -> str:
    parts = [f"{a.n_heads} query and {a.n_kv_heads} key-value head{'s' * (a.n_kv_heads > 1)} of {a.head_dim}"]
    reach = {a.window: f"the last {a.window or 0:,} positions", a.chunk: f"its own chunk of {a.chunk or 0:,}"}
    parts.append("sees " + (reach[a.window or a.chunk] if a.window or a.chunk else "all"))
    parts.append(_rope(a.rope) if a.rope is not None else "no rotary positions")
    if a.qk_norm is not None:
        parts.append(_qk_norm(a.qk_norm))
    if a.bias:
        parts.append("biases on queries, keys, values" + " and output" * a.out_bias)
    if a.scale_dim is not None:
        parts.append(f"scores over the root of {a.scale_dim:g}")
    if a.softcap is not None:
        parts.append(f"scores capped at {a.softcap:g}")
    parts += ["a learned sink for each head"] * a.sinks + ["output gated by a sigmoid"] * a.gate
    if a.temperature is not None:
        parts.append(_temperature(a.temperature))
    return "; ".join(parts)


def _mla(m: MLAConfig) -> str:
    parts = [
        f"latent attention, {m.n_heads} heads: queries and keys {m.nope_dim} + {m.rope_dim} rotary, values {m.v_dim}",
        f"a latent of {m.kv_rank:,} for keys and values, {f'one of {m.q_rank:,}' if m.q_rank else 'none'} for queries",
        _rope(m.rope),
    ]
    return "; ".join(parts)


def _deltanet(d: DeltaNetConfig) -> str:
    heads = f"{d.n_v_heads} value heads of {d.v_dim} on {d.n_k_heads} key heads of {d.k_dim}"
    return f"gated DeltaNet, {heads}; convolution over {d.conv} positions; a state of fixed size"


def _rope(r: RopeConfig) -> str:
    parts = [f"rotary base {r.theta:,.0f}"]
    parts += [f"first {r.fraction:.0%} of a head"] * (r.fraction != 1) + ["neighbours in pairs"] * r.interleaved
    if r.scaling is not None:
        since = "" if r.scaling.kind is Scaling.linear else f" from {r.scaling.original_context:,}"
        parts.append(f"{r.scaling.kind} scaling by {r.scaling.factor:g}{since}")
    return ", ".join(parts)


def _qk_norm(n: QKNormConfig) -> str:
    over = {"head": "each head", "own": "each head, weights of its own", "width": "all heads together"}
    kinds = {"rms": "", "layer": ", LayerNorm", "bare": ", without weight"}
    return f"queries and keys normalised{' after rotation' * n.after_rope} ({over[n.scope]}{kinds[n.kind]})"


def _temperature(t: TemperatureConfig) -> str:
    return f"sharper beyond position {t.floor:,} ({t.kind})"


def _mlp(m: MLPConfig) -> str:
    return f"{m.activation} of {m.d_ff:,}" + " with biases" * m.bias


def _moe(m: MoEConfig) -> str:
    parts = [f"{m.n_experts} experts, {m.activation} of {m.d_expert:,}" + " with biases" * m.bias]
    parts.append(f"{m.top_k} chosen")
    if m.d_shared:
        parts.append(f"a shared one of {m.d_shared:,}" + " with a gate" * m.shared_gate)
    parts += ["weights multiply their input"] * m.scale_input
    return ", ".join(parts) + "; " + _router(m.router)


def _router(r: RouterConfig) -> str:
    scores = {"softmax": "softmax", "softmax_chosen": "softmax of the chosen", "sigmoid": "sigmoid"}
    parts = [f"router: {scores[r.score]}"]
    parts += ["divided by their sum"] * r.normalize + [f"times {r.scale:g}"] * (r.scale != 1)
    parts += [f"{r.top_groups} of {r.n_groups} groups"] * (r.n_groups > 1) + ["with bias"] * r.bias
    if r.softcap is not None:
        parts.append(f"logits capped at {r.softcap:g}")
    if r.balance_rate is not None:
        parts.append(f"balanced by a bias moved {r.balance_rate:g} an update")
    parts += [f"sequence-wise balance loss {r.balance_loss:g}"] * bool(r.balance_loss)
    if r.switch_loss.weight:
        scope = {BatchScope.micro_batch: "a micro-batch", BatchScope.global_batch: "the global batch"}
        parts.append(f"switch loss {r.switch_loss.weight:g} over {scope[r.switch_loss.scope]}")
    d = r.device_loss
    if d.on:
        parts.append(f"losses {d.expert:g} over experts, {d.device:g} devices, {d.communication:g} communication")
    parts += [f"z-loss {r.z_loss:g}"] * bool(r.z_loss)
    return ", ".join(parts)
