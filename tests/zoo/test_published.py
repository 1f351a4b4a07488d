"""Every value of the published sizes is the one that its publisher gives; the figures are in published.yaml beside."""

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import compose

from zoo.config_ff import GroupScore, SwitchLossConfig
from zoo.config_mixer import NormKind, Scaling, Scope, TemperatureConfig, TemperatureKind
from zoo.rope import phase_factor, softmax_factor

TABLE = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))
FAMILY = {"kimi_k2": "deepseek_v3", "glm4_moe": "glm45"}  # ours, where the survey names it otherwise
QWEN3_CONTEXT = 32768
"""Of the base models, native: 131,072 in the survey takes YaRN at inference, which no checkpoint configures."""
ACTIVATIONS = {"gelu_tanh": "gelu", "geglu_tanh": "geglu", "clamped_swiglu": "swiglu_clamped"}
PLACEMENTS = {
    "pre": (True, False),
    "post_inside_residual": (False, True),
    "sandwich": (True, True),
}  # pre_norm, post_norm
WEIGHT_IN_FP32 = {"after_cast": False, "before_cast": True, "fp32 (1+w) before cast": True, "n/a": False, None: False}
NORM_KINDS = {"rmsnorm": "rms", "rmsnorm (1+w)": "rms", "rms_l2 (no weight)": "bare", "layernorm": "layer"}
SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "softmax_after_topk": "softmax_chosen"}

every = pytest.mark.parametrize("name", TABLE)
latent = pytest.mark.parametrize("name", [name for name in TABLE if "mla" in TABLE[name]["attention"]])
delta = pytest.mark.parametrize("name", [name for name in TABLE if "deltanet" in TABLE[name]["attention"]])
sparse = pytest.mark.parametrize("name", [name for name in TABLE if "moe" in TABLE[name]])


def has_experts(i: int, said: dict[str, Any]) -> bool:
    moe = said.get("moe")
    return moe is not None and i >= moe["first_dense"] and (i + 1) % moe["layer_step"] == 0


def kind(i: int, said: dict[str, Any]) -> str:
    pattern = said["attention"]["layer_pattern"]
    return pattern[i % len(pattern)]


def attentions(config, said):
    """Number, published kind and config of the layers that have grouped-query attention."""
    return [(i, kind(i, said), layer.attention) for i, layer in enumerate(config.layers) if layer.attention is not None]


@every
def test_sizes_and_what_stands_around_the_layers(name):
    config, said = compose(name), TABLE[name]
    model = said["model"]
    assert config.family == FAMILY.get(model["family"], model["family"])
    for key in ("n_layers", "d_model", "vocab_size"):
        assert getattr(config, key) == model[key]
    assert config.context == (QWEN3_CONTEXT if config.family in ("qwen3", "qwen3_moe") else model["max_context"])
    assert config.tied == model["tied_embeddings"]
    assert config.n_mtp == model["mtp_depth"]
    assert config.learned_positions == (said["position"]["type"] == "learned_absolute")
    assert config.logit_scale == model.get("output_multiplier", 1)
    assert config.logit_softcap == model.get("final_logit_softcap")
    multiplier = model.get("embedding_multiplier")
    assert config.scale_embed == (multiplier is not None)
    if isinstance(multiplier, float):
        assert config.d_model**0.5 == pytest.approx(multiplier, rel=1e-12)


@every
def test_initial_values_where_they_are_published(name):
    config, said = compose(name), TABLE[name]
    init = said.get("init", {})
    scheme = init.get("scheme", "")
    assert config.init.std == init.get("std", config.init.std)
    assert config.init.scale_residual == ("sqrt(2*n_layer)" in scheme)
    assert config.init.cutoff == (3 if "cut at 3 std" in scheme else None)


@every
def test_norms_around_the_halves_of_a_layer(name):
    config, said = compose(name), TABLE[name]
    norm = said["norm"]
    assert config.norm.kind == NORM_KINDS[norm["type"]]
    assert (config.norm.kind is NormKind.layer) == norm["bias"]
    assert config.norm.eps == norm["eps"]
    assert config.norm.offset == norm["one_plus_weight"]
    assert config.norm.late_cast == WEIGHT_IN_FP32[norm.get("weight_mul")]
    for layer in config.layers:
        assert (layer.pre_norm, layer.post_norm) == PLACEMENTS[norm["placement"].split(":")[0]]
        assert 2 * (layer.pre_norm + layer.post_norm) == norm["norms_per_layer"]


@every
def test_what_each_layer_mixes_with_and_what_it_sees(name):
    config, said = compose(name), TABLE[name]
    attention = said["attention"]
    for i, layer in enumerate(config.layers):
        assert (layer.deltanet is not None) == (kind(i, said) == "linear")
        assert (layer.mla is not None) == ("mla" in attention)
    for _, sees, mixer in attentions(config, said):
        assert mixer.window == (attention["sliding_window"] if sees == "sliding" else None)
        assert mixer.chunk == (attention["chunk_size"] if sees == "chunked" else None)


@every
def test_heads_biases_sinks_caps_and_gates(name):
    config, said = compose(name), TABLE[name]
    attention = said["attention"]
    for _, _, mixer in attentions(config, said):
        for key in ("n_heads", "n_kv_heads", "head_dim"):
            assert getattr(mixer, key) == attention[key]
        assert attention["v_head_dim"] == attention["head_dim"]
        assert [mixer.bias] * 3 + [mixer.out_bias] == [attention["bias"][key] for key in "qkvo"]
        assert mixer.sinks == bool(attention["sinks"])
        cap = attention.get("logit_softcap")
        assert mixer.softcap == (None if cap is None else float(cap.split("*tanh")[0]))
        assert mixer.gate == ("output_gate" in attention)


@latent
def test_latent_attention(name):
    config, said = compose(name), TABLE[name]
    for layer in config.layers:
        if layer.mla is not None:
            m, attention, ranks = layer.mla, said["attention"], said["attention"]["mla"]
            assert m.n_heads == attention["n_heads"] == attention["n_kv_heads"]
            keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
            assert [m.q_rank, m.kv_rank, m.nope_dim, m.rope_dim] == [ranks[key] for key in keys]
            assert m.nope_dim + m.rope_dim == attention["head_dim"]
            assert m.v_dim == ranks["v_head_dim"] == attention["v_head_dim"]
            assert (m.norm.kind, m.norm.eps, m.norm.offset, m.norm.late_cast) == ("rms", 1e-6, 0, False)
            assert not any(attention["bias"].values())


@delta
def test_delta_layers(name):
    config, said = compose(name), TABLE[name]
    for layer in config.layers:
        if layer.deltanet is not None:
            n, published = layer.deltanet, said["attention"]["deltanet"]
            keys = ("n_k_heads", "n_v_heads", "head_k_dim", "head_v_dim", "conv_kernel")
            assert [n.n_k_heads, n.n_v_heads, n.k_dim, n.v_dim, n.conv] == [published[key] for key in keys]
            assert (n.norm.kind, n.norm.eps, n.norm.offset, n.norm.late_cast) == ("rms", 1e-6, 0, False)


@every
def test_norms_of_queries_and_keys(name):
    config, said = compose(name), TABLE[name]
    published = said["attention"].get("qk_norm")
    only_rotated = published is not None and published.get("applies_to") == "RoPE layers only"
    for i, _, mixer in attentions(config, said):
        assert (mixer.qk_norm is not None) == (published is not None and not (only_rotated and lacks_rope(i, said)))
        if mixer.qk_norm is not None:
            norm, scope = mixer.qk_norm, published["scope"]
            own = Scope.own if "separate weight+bias" in scope else Scope.head
            assert norm.kind == NORM_KINDS[published["type"]]
            assert norm.scope == (Scope.width if scope.startswith("whole projection") else own)
            assert norm.after_rope == (published["order"] == "AFTER rope")
            assert norm.eps == said["norm"]["eps"]
            assert norm.offset == ("(1+w)" in published["type"])
            assert norm.late_cast == (norm.kind is NormKind.rms and WEIGHT_IN_FP32[said["norm"]["weight_mul"]])


def lacks_rope(i: int, said: dict[str, Any]) -> bool:
    position = said["position"]
    if "nope" in position:
        assert position["nope"].startswith("layers with (i+1)%4==0")
        return (i + 1) % 4 == 0
    return position["type"] == "learned_absolute"


@every
def test_rotary_positions_of_each_layer(name):
    config, said = compose(name), TABLE[name]
    position = said["position"]
    for i, layer in enumerate(config.layers):
        if layer.deltanet is not None:
            continue
        mixer = layer.attention or layer.mla
        assert (mixer.rope is None) == lacks_rope(i, said)
        if mixer.rope is not None:
            local = kind(i, said) == "sliding" and "theta_local" in position
            assert mixer.rope.theta == position["theta_local" if local else "theta"]
            layout = position.get("layout_hf") or position["layout_original"]
            assert mixer.rope.interleaved == layout.startswith("interleaved")
            assert mixer.rope.turning(layer.mla.rope_dim if layer.mla else mixer.head_dim) == position["rotary_dim"]
            assert mixer.rope.fraction == position.get("partial_rotary_factor", 1)


@every
def test_scaling_of_rotary_frequencies_in_each_layer(name):
    config, said = compose(name), TABLE[name]
    published = said["position"].get("scaling", {"type": "none"})
    if published["type"].startswith(("none", "config rope_type")):  # the latter unresolved: as sglang, unscaled
        published = None
    for i, layer in enumerate(config.layers):
        rope = (layer.attention or layer.mla).rope if layer.attention or layer.mla else None
        if rope is None:
            continue
        here = published
        if published and published.get("applies") == "global layers only" and kind(i, said) != "full":
            here = None
        assert (rope.scaling is None) == (here is None)
        if here is not None:
            s = rope.scaling
            assert (s.kind, s.factor) == (Scaling(here["type"]), here["factor"])
            assert s.original_context == here.get("original_context")
            assert s.low == here.get("low_freq_factor", here.get("beta_slow"))
            assert s.high == here.get("high_freq_factor", here.get("beta_fast"))
            assert s.truncate == here.get("truncate", True)
            if s.kind is Scaling.yarn:
                assert [s.mscale_all_dim, s.mscale] == [here.get("mscale_all_dim", 0), here.get("mscale", 1)]
                phases = re.search(r"= ([\d.]+)", str(here["cos_sin_factor"]))  # "0.1*ln(32)+1 = 1.346574 on …"
                given = float(phases[1]) if phases else here["cos_sin_factor"]
                assert phase_factor(rope, context=config.context) == pytest.approx(given, abs=5e-7)


@every
def test_softmax_scale_of_each_layer(name):
    config, said = compose(name), TABLE[name]
    phrase = said["attention"]["softmax_scale"]  # as "… (5376/32=168)**-0.5 …" or "192**-0.5 * … 1.813260 …"
    width = re.search(r"(\d+)\)?\*\*-0\.5", phrase)
    dim = int(width[1]) if width else said["attention"]["head_dim"]
    for _, _, mixer in attentions(config, said):
        assert mixer.scale == pytest.approx(dim**-0.5, rel=1e-15)
    for layer in config.layers:
        if layer.mla is not None:
            assert layer.mla.nope_dim + layer.mla.rope_dim == dim
            factor = float(re.search(r"1\.\d{6}", phrase)[0])
            assert softmax_factor(layer.mla.rope, context=config.context) == pytest.approx(factor, abs=5e-7)


@every
def test_temperature_of_each_layer(name):
    config, said = compose(name), TABLE[name]
    published = said["attention"].get("temperature")
    for i, _, mixer in attentions(config, said):
        if published is None or (published["layers"] == "NoPE layers only" and not lacks_rope(i, said)):
            assert mixer.temperature is None
        elif published["layers"] == "all":
            floor = published["attn_temperature_len"]
            assert mixer.temperature == TemperatureConfig(kind=TemperatureKind.ratio, floor=floor)
        else:
            floor, scale = published["floor_scale"], published["attn_scale"]
            assert mixer.temperature == TemperatureConfig(kind=TemperatureKind.steps, floor=floor, scale=scale)


@every
def test_feed_forward_of_each_layer(name):
    config, said = compose(name), TABLE[name]
    ffn = said["ffn"]
    beside = "parallel dense MLP" in said.get("moe", {}).get("shared_gate", "")
    for i, layer in enumerate(config.layers):
        assert (layer.moe is not None) == has_experts(i, said)
        assert (layer.mlp is not None) == (beside or not has_experts(i, said))
        assert layer.ff_scale == pytest.approx(math.sqrt(0.5) if beside else 1, rel=1e-15)
        for part in (layer.mlp, layer.moe):
            assert part is None or part.activation == ACTIVATIONS.get(ffn["activation"], ffn["activation"])
        if layer.mlp is not None:
            assert (layer.mlp.d_ff, layer.mlp.bias) == (ffn["hidden"], ffn["bias"])


@sparse
def test_experts_and_their_routing_in_each_layer(name):
    config, said = compose(name), TABLE[name]
    for layer in config.layers:
        if layer.moe is None:
            continue
        moe, router, published = layer.moe, layer.moe.router, said["moe"]
        gate = published.get("shared_gate", "")
        beside = "parallel dense MLP" in gate  # the survey calls Grok's mlp a shared expert
        keys = ("n_routed", "top_k", "expert_hidden")
        assert [moe.n_experts, moe.top_k, moe.d_expert] == [published[key] for key in keys]
        assert moe.d_shared == (0 if beside else published["shared_hidden"])
        assert moe.shared_gate == gate.startswith("sigmoid")
        assert moe.bias == published["expert_bias"]
        assert moe.scale_input == published["weight_applied_to"].startswith("expert INPUT")
        assert router.score == SCORES[published["router_score"]]
        chosen = published["router_score"] == "softmax_after_topk"  # these sum to one as they are
        assert router.normalize == (published["norm_topk"] and not chosen)
        assert [router.scale, router.bias] == [published["routed_scaling"], published["router_bias"]]
        assert router.softcap == published.get("router_softcap")
        groups = published.get("group_limited", {"n_group": 1, "topk_group": 1})
        assert (router.n_groups, router.top_groups) == (groups["n_group"], groups["topk_group"])
        if router.n_groups > 1:
            best = GroupScore.best if groups["group_score"] == "max" else GroupScore.best_two
            assert router.group_score is best


@sparse
def test_balancing_is_the_published_kind(name):
    """Kimi K2's rate and weight are unpublished: ours are DeepSeek-V3's."""
    config, said = compose(name), TABLE[name]
    bias, loss = said["moe"].get("bias_balancing"), said["moe"].get("aux_loss") or {}
    kind, weight = loss.get("kind"), loss.get("coef")
    switch = {"switch_load_balancing": "micro_batch", "global_batch_load_balancing": "global_batch"}
    for layer in config.layers:
        if layer.moe is None:
            continue
        r = layer.moe.router
        assert r.balance_rate == (None if bias is None else bias.get("update_rate", 0.001))
        assert r.balance_loss == ((weight or 0.0001) if kind == "sequence_wise" else 0)
        switched = {"weight": weight, "scope": switch[kind]} if kind in switch else asdict(SwitchLossConfig())
        assert asdict(r.switch_loss) == switched
        assert asdict(r.device_loss) == {key: loss.get(key, 0) for key in ("expert", "device", "communication")}
        assert r.z_loss == 0
