"""Every shipped architecture composes, tiny ones keep what is theirs, and what cannot be built is refused."""

import dataclasses
import math
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException
from models import PUBLISHED, SHIPPED, compose
from omegaconf.errors import OmegaConfBaseException

from zoo.config import expanded
from zoo.config_mixer import Scaling
from zoo.rope import acting

PARENTS = {
    "gpt2_tiny": "gpt2_124m",
    "llama3_tiny": "llama31_8b",
    "deepseek_v2_tiny": "deepseek_v2_236b",
    "deepseek_v3_tiny": "deepseek_v3_671b",
    "olmo2_tiny": "olmo2_7b",
    "gemma3_tiny": "gemma3_27b",
    "mistral_tiny": "mistral_7b",
    "mistral_small_tiny": "mistral_small_24b",
    "mixtral_tiny": "mixtral_8x7b",
    "llama4_scout_tiny": "llama4_scout",
    "llama4_maverick_tiny": "llama4_maverick",
    "qwen3_tiny": "qwen3_06b",
    "qwen3_moe_tiny": "qwen3_30b_a3b",
    "smollm3_tiny": "smollm3_3b",
    "kimi_k2_tiny": "kimi_k2_1t",
    "gpt_oss_tiny": "gpt_oss_20b",
    "grok2_tiny": "grok2_270b",
    "glm45_tiny": "glm45_355b",
    "glm45_air_tiny": "glm45_air_106b",
    "qwen3_next_tiny": "qwen3_next_80b_a3b",
    "chameleon_tiny": "chameleon_7b",
}
SHORT = 128
"""Tokens of a row on which every window, chunk and temperature of a tiny model is to act."""


def test_every_architecture_that_the_design_names_is_shipped():
    assert len(PUBLISHED) == 41
    assert set(PARENTS) == set(SHIPPED) - set(PUBLISHED)
    assert set(PARENTS.values()) <= set(PUBLISHED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_kind_of_layer_is_used(name):
    config = compose(name)
    assert set(config.kinds) == set(config.blocks)
    assert len(config.layers) == config.n_layers


def slots(part: Any) -> Any:
    """The shape of a config without its numbers: which slots are filled, which switches set."""
    if dataclasses.is_dataclass(part):
        return {field.name: slots(getattr(part, field.name)) for field in dataclasses.fields(part)}
    if isinstance(part, dict):
        return {key: slots(value) for key, value in part.items()}
    return part if isinstance(part, bool | str) or part is None else type(part)


@pytest.mark.parametrize("name", PARENTS)
def test_a_tiny_model_fills_the_slots_of_the_published_one(name):
    tiny, parent = compose(name), compose(PARENTS[name])
    assert slots(tiny) == slots(parent)
    assert tiny.n_mtp == parent.n_mtp
    assert tiny.cycle == parent.cycle
    assert tiny.prefix == parent.prefix[:1]
    assert list(dict.fromkeys(tiny.kinds)) == list(dict.fromkeys(parent.kinds))  # order in which kinds come
    assert tiny.kinds[-1] == parent.kinds[-1] or not tiny.n_mtp  # multi-token modules are like the last layer
    assert tiny.d_model < parent.d_model
    assert tiny.vocab_size == 4096


@pytest.mark.parametrize("name", PARENTS)
def test_a_tiny_model_can_be_split_in_two_and_into_tiles_of_16(name):
    config = compose(name)
    widths = [config.d_model]
    for layer in config.layers:
        if layer.attention is not None:
            assert layer.attention.n_kv_heads % 2 == 0
            widths.append(layer.attention.head_dim)
        if layer.mla is not None:
            m = layer.mla
            assert m.n_heads % 2 == 0
            widths += [m.q_rank, m.kv_rank, m.nope_dim, m.rope_dim, m.v_dim]
        if layer.deltanet is not None:
            assert layer.deltanet.n_k_heads % 2 == 0
            widths += [layer.deltanet.k_dim, layer.deltanet.v_dim]
        if layer.mlp is not None:
            widths.append(layer.mlp.d_ff)
        if layer.moe is not None:
            assert layer.moe.n_experts % 4 == 0
            widths += [layer.moe.d_expert, layer.moe.d_shared]
    assert all(width % 16 == 0 for width in widths)


@pytest.mark.parametrize("name", PARENTS)
def test_what_depends_on_length_acts_on_short_rows_of_a_tiny_model(name):
    for layer in compose(name).layers:
        if layer.attention is not None:
            a = layer.attention
            assert all(bound < SHORT for bound in (a.window, a.chunk) if bound is not None)
            assert a.temperature is None or a.temperature.floor < SHORT / 2


@pytest.mark.parametrize(
    ("name", "acts"), [("deepseek_v3_tiny", False), ("deepseek_v2_tiny", True), ("gpt_oss_tiny", True)]
)
def test_yarn_acts_or_rests_as_the_file_of_the_tiny_model_says(name, acts):
    config = compose(name)
    mixer = config.layers[0].attention or config.layers[0].mla
    assert mixer.rope.scaling.kind is Scaling.yarn
    assert (acting(mixer.rope, context=config.context) is not None) == acts


def test_layers_follow_prefix_and_cycle():
    config = compose("deepseek_v3_tiny", n_layers=6, prefix=["dense"], cycle=["moe", "dense"])
    assert config.kinds == ["dense", "moe", "dense", "moe", "dense", "moe"]


def test_names_of_kinds_mean_nothing_in_an_expanded_config():
    config = compose("smollm3_tiny")
    renamed = {"a": config.blocks["rope"], "b": config.blocks["nope"]}
    other = dataclasses.replace(config, blocks=renamed, prefix=["a"], cycle=["a", "a", "b"])
    assert expanded(other) == expanded(config)
    assert expanded(dataclasses.replace(other, cycle=["a", "b"])) != expanded(config)


ATTENTION, MLA, MOE = "blocks__dense__attention__", "blocks__moe__mla__", "blocks__moe__moe__"
SCALING = f"{ATTENTION}rope__scaling__"
DELTA = "blocks__delta__deltanet__"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3_tiny", {"d_model": 0}, "model.d_model=0: must be above 0"),
        ("llama3_tiny", {"cycle": ["sparse"]}, "model.cycle=sparse: must be one of ['dense']"),
        ("llama3_tiny", {"prefix": ["sparse"]}, "model.prefix=sparse: must be one of ['dense']"),
        ("llama3_tiny", {"family": "llama 9"}, "model.family=llama 9: must be a name of letters, digits and _"),
        ("llama3_tiny", {"prefix": ["dense"] * 5}, "at most n_layers (4) names"),
        ("llama3_tiny", {f"{ATTENTION}n_kv_heads": 3}, "attention.n_kv_heads=3: must be a divisor of n_heads (8)"),
        ("llama3_tiny", {f"{ATTENTION}head_dim": 7}, "attention.head_dim=7: must be even, for rotation in pairs"),
        (
            "llama3_tiny",
            {f"{ATTENTION}chunk": 4, f"{ATTENTION}window": 4},
            "attention.window=4: must be null where chunk",
        ),
        ("llama3_tiny", {f"{ATTENTION}rope__fraction": 1.5}, "rope.fraction=1.5: must be above 0 and at most 1"),
        ("llama3_tiny", {f"{ATTENTION}rope__fraction": 0.01}, "attention.head_dim=32: must be even"),
        ("llama3_tiny", {f"{SCALING}factor": 0.5}, "rope.scaling.factor=0.5: must be at least 1"),
        ("llama3_tiny", {f"{SCALING}low": 8}, "rope.scaling.low=8.0: must be at most high (4.0)"),
        ("llama3_tiny", {f"{SCALING}low": None}, "rope.scaling.low=None: must be set for llama3 and yarn"),
        ("llama3_tiny", {f"{SCALING}kind": "linear"}, "rope.scaling.original_context=8192: must be set for llama3"),
        ("llama3_tiny", {"blocks__dense__mlp": None}, "blocks.*=no feed-forward: must be mlp, moe or both"),
        ("llama3_tiny", {"blocks__dense__attention": None}, "blocks.*=no mixer: must be exactly one of attention, mla"),
        ("llama3_tiny", {"norm__kind": "layer", "norm__late_cast": True}, "norm.kind=layer: must be rms where"),
        ("llama3_tiny", {"norm__offset": 2}, "norm.offset=2.0: must be 0 or 1"),
        ("llama3_tiny", {"init__std": 0}, "init.std=0.0: must be above 0"),
        ("gpt2_tiny", {"n_mtp": 1}, "model.n_mtp=1: must be 0 with learned_positions"),
        ("qwen3_tiny", {f"{ATTENTION}qk_norm__scope": "own"}, "qk_norm.scope=own: must be head or width unless kind"),
        (
            "qwen3_tiny",
            {f"{ATTENTION}qk_norm__after_rope": True},
            "qk_norm.after_rope=True: must be false unless kind is",
        ),
        (
            "llama4_scout_tiny",
            {"blocks__chunked__attention__qk_norm__scope": "width"},
            "qk_norm.after_rope=True: must be false unless kind is bare",
        ),
        (
            "llama4_scout_tiny",
            {"blocks__full__attention__temperature__floor": 1},
            "temperature.floor=1: must be above 1",
        ),
        (
            "gpt_oss_tiny",
            {"blocks__local__attention__rope__scaling__mscale_all_dim": 1},
            "attention.rope.scaling.mscale_all_dim=1.0: must be 0: only the scores of mla are scaled by it",
        ),
        (
            "llama4_maverick_tiny",
            {"blocks__full__moe__n_experts": 8},
            "moe.n_experts=[8, 16]: must be the same number in all layers",
        ),
        ("deepseek_v3_tiny", {f"{MLA}rope__fraction": 0.5}, "mla.rope.fraction=0.5: must be 1"),
        ("deepseek_v3_tiny", {f"{MLA}rope_dim": 15}, "mla.rope_dim=15: must be even, for rotation in pairs"),
        ("deepseek_v3_tiny", {f"{MOE}top_k": 9}, "moe.top_k=9: must be 1 to 8, the experts of top_groups groups"),
        ("deepseek_v3_tiny", {f"{MOE}router__n_groups": 3}, "router.n_groups=3: must be a divisor of n_experts (16)"),
        (
            "deepseek_v3_tiny",
            {f"{MOE}router__n_groups": 16},
            "router.n_groups=16: must be groups of two experts or more",
        ),
        ("deepseek_v3_tiny", {f"{MOE}router__top_groups": 5}, "router.top_groups=5: must be 1 to n_groups (4)"),
        ("deepseek_v3_tiny", {f"{MOE}activation": "gelu"}, "moe.activation=gelu: must be one with a gate"),
        ("mixtral_tiny", {f"{MOE}shared_gate": True}, "moe.shared_gate=True: must be false without d_shared"),
        ("qwen3_next_tiny", {f"{DELTA}n_k_heads": 3}, "deltanet.n_k_heads=3: must be a divisor of n_v_heads (8)"),
    ],
)
def test_a_value_that_cannot_be_built_is_refused_in_one_line(name, change, message):
    with pytest.raises(ValueError) as caught:
        compose(name, **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_has_one_mixer():
    mla = compose("deepseek_v3_tiny").blocks["moe"].mla
    with pytest.raises(ValueError, match="must be exactly one of attention, mla, deltanet"):
        dataclasses.replace(compose("llama3_tiny").blocks["dense"], mla=mla)


def test_groups_of_one_expert_are_fine_where_a_group_is_worth_its_best_expert():
    compose("deepseek_v2_tiny", **{f"{MOE}router__n_groups": 16, f"{MOE}router__top_groups": 8})


WHOLE = [
    *(("llama3_tiny", ATTENTION + key) for key in ("n_heads", "n_kv_heads", "head_dim", "window", "chunk")),
    *(("llama3_tiny", key) for key in ("d_model", "n_layers", "vocab_size", "context")),
    *(("llama3_tiny", key) for key in ("blocks__dense__mlp__d_ff", f"{SCALING}original_context")),
    *(("deepseek_v3_tiny", MLA + key) for key in ("n_heads", "q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim")),
    *(("deepseek_v3_tiny", MOE + key) for key in ("n_experts", "top_k", "d_expert")),
    *(("deepseek_v3_tiny", f"{MOE}router__{key}") for key in ("n_groups", "top_groups")),
    *(("qwen3_next_tiny", DELTA + key) for key in ("n_k_heads", "n_v_heads", "k_dim", "v_dim", "conv")),
]
NUMBERS = [
    *(("llama3_tiny", key) for key in ("init__std", "init__cutoff", "norm__eps", "logit_scale", "logit_softcap")),
    *(("llama3_tiny", ATTENTION + key) for key in ("rope__theta", "scale_dim", "softcap")),
    *(("llama3_tiny", SCALING + key) for key in ("factor", "low", "high")),
    ("llama3_tiny", "blocks__dense__ff_scale"),
    ("qwen3_tiny", f"{ATTENTION}qk_norm__eps"),
    *(("deepseek_v3_tiny", f"{MOE}router__{key}") for key in ("scale", "softcap")),
    ("llama4_scout_tiny", "blocks__full__attention__temperature__scale"),
]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((*where, value) for where in WHOLE for value in (0, -4)),
        *((*where, value) for where in NUMBERS for value in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_a_size_that_is_not_above_0_is_refused_by_its_own_key(name, key, value):
    """Not by that of another with which it does not fit, and not by a division."""
    with pytest.raises(ValueError) as caught:
        compose(name, **{key: value})
    assert f".{key.rpartition('__')[2]}={value}: must be" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["router__balance_rate", "router__balance_loss", "d_shared"])
def test_what_may_be_0_is_refused_below(key):
    compose("deepseek_v3_tiny", **{MOE + key: 0})
    with pytest.raises(ValueError, match="must be 0 or more"):
        compose("deepseek_v3_tiny", **{MOE + key: -1})


def test_a_family_that_transformers_does_not_hold_is_a_choice_of_its_own():
    assert compose("llama3_tiny", family="llama9").family == "llama9"


def test_an_unknown_key_and_an_ill_typed_value_are_refused():
    with pytest.raises((OmegaConfBaseException, ConfigCompositionException), match="d_modle"):
        compose("llama3_tiny", d_modle=64)
    with pytest.raises((OmegaConfBaseException, ConfigCompositionException), match="wide"):
        compose("llama3_tiny", d_model="wide")
