"""Every shipped architecture composes, says what its publisher says, and refuses what cannot be built."""

import dataclasses
import math
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException
from models import PUBLISHED, SHIPPED, compose
from omegaconf.errors import OmegaConfBaseException

from zoo import hf_config
from zoo.config import FAMILIES, AttentionConfig, MLAConfig, ModelConfig, RopeScalingConfig, Scaling

PARENTS = {"llama3_tiny": "llama31_8b", "qwen3_tiny": "qwen3_06b", "deepseek_v3_tiny": "deepseek_v3_671b"}

LLAMA_31_SCALING = RopeScalingConfig(kind=Scaling.llama3, factor=8.0, original_context=8192, low=1.0, high=4.0)
LLAMA_32_SCALING = dataclasses.replace(LLAMA_31_SCALING, factor=32.0)
DEEPSEEK_SCALING = RopeScalingConfig(
    kind=Scaling.yarn, factor=40.0, original_context=4096, low=1.0, high=32.0, mscale=1.0, mscale_all_dim=1.0
)


@dataclasses.dataclass
class Facts:
    """What carries no parameters, copied from the survey of published architectures (shared/architectures.yaml).

    Its sources: Llama github meta-llama/llama-models args.py and MODEL_CARD.md; Qwen3 config.json copies in litgpt and
    arXiv 2505.09388, where context is that of the base checkpoints; DeepSeek-V3 inference/configs/config_671B.json.
    """

    context: int
    eps: float
    theta: float
    tied: bool
    n_heads: int
    scaling: RopeScalingConfig | None = None
    head_dim: int = 128
    n_mtp: int = 0
    interleaved: bool = False


FACTS = {
    "llama3_8b": Facts(8192, 1e-5, 5e5, False, 32),
    "llama3_70b": Facts(8192, 1e-5, 5e5, False, 64),
    "llama31_8b": Facts(131072, 1e-5, 5e5, False, 32, LLAMA_31_SCALING),
    "llama31_70b": Facts(131072, 1e-5, 5e5, False, 64, LLAMA_31_SCALING),
    "llama31_405b": Facts(131072, 1e-5, 5e5, False, 128, LLAMA_31_SCALING),
    "llama32_1b": Facts(131072, 1e-5, 5e5, True, 32, LLAMA_32_SCALING, head_dim=64),
    "qwen3_06b": Facts(32768, 1e-6, 1e6, True, 16),
    "qwen3_17b": Facts(32768, 1e-6, 1e6, True, 16),
    "qwen3_4b": Facts(32768, 1e-6, 1e6, True, 32),
    "qwen3_8b": Facts(32768, 1e-6, 1e6, False, 32),
    "qwen3_14b": Facts(32768, 1e-6, 1e6, False, 40),
    "qwen3_32b": Facts(32768, 1e-6, 1e6, False, 64),
    "deepseek_v3_671b": Facts(163840, 1e-6, 1e4, False, 128, DEEPSEEK_SCALING, 192, n_mtp=1, interleaved=True),
}


def mixers(config: ModelConfig) -> list[AttentionConfig | MLAConfig]:
    return [mixer for layer in config.layers for mixer in (layer.attention, layer.mla) if mixer is not None]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_without_parameters_are_the_published_ones(name):
    config, facts = compose(name), FACTS[name]
    assert (config.context, config.tied, config.n_mtp) == (facts.context, facts.tied, facts.n_mtp)
    assert config.norm.eps == facts.eps
    assert len(mixers(config)) == config.n_layers
    for mixer in mixers(config):
        assert mixer.n_heads == facts.n_heads
        assert mixer.rope.theta == facts.theta
        assert mixer.rope.interleaved == facts.interleaved
        assert mixer.rope.scaling == facts.scaling
        if isinstance(mixer, MLAConfig):
            assert mixer.nope_dim + mixer.rope_dim == facts.head_dim
            assert mixer.norm.eps == 1e-6
        else:
            assert (mixer.n_kv_heads, mixer.head_dim) == (8, facts.head_dim)
            assert (mixer.qk_norm is not None) == (config.family == "qwen3")
            assert mixer.qk_norm is None or mixer.qk_norm.eps == 1e-6


def test_routing_of_deepseek_v3_is_the_published_one():
    config = compose("deepseek_v3_671b")
    assert config.kinds == ["dense"] * 3 + ["moe"] * 58
    assert config.init_std == 0.006
    moe = config.layers[-1].moe
    assert moe is not None
    assert (moe.n_experts, moe.top_k, moe.d_expert, moe.d_shared) == (256, 8, 2048, 2048)
    router = moe.router
    assert (router.scale, router.n_groups, router.top_groups) == (2.5, 8, 4)
    assert (router.balance_rate, router.balance_loss) == (0.001, 0.0001)


def test_every_published_size_has_its_facts_and_every_family_a_tiny_one():
    assert set(FACTS) == set(PUBLISHED)
    assert set(PARENTS) == set(SHIPPED) - set(PUBLISHED)


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
    assert tiny.family == parent.family
    assert tiny.tied == parent.tied
    assert tiny.n_mtp == parent.n_mtp
    assert tiny.cycle == parent.cycle
    assert list(dict.fromkeys(tiny.kinds)) == list(dict.fromkeys(parent.kinds))  # order in which kinds come
    assert slots(tiny.blocks) == slots(parent.blocks)
    assert tiny.d_model < parent.d_model
    assert tiny.vocab_size == 4096


def test_layers_follow_prefix_and_cycle():
    config = compose("deepseek_v3_tiny", n_layers=6, prefix=["dense"], cycle=["moe", "dense"])
    assert config.kinds == ["dense", "moe", "dense", "moe", "dense", "moe"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3_tiny", {"d_model": 0}, "model.d_model=0: must be above 0"),
        ("llama3_tiny", {"cycle": ["sparse"]}, "model.cycle=sparse: must be one of ['dense']"),
        ("llama3_tiny", {"prefix": ["sparse"]}, "model.prefix=sparse: must be one of ['dense']"),
        ("llama3_tiny", {"family": "llama9"}, "model.family=llama9: must be one of deepseek_v3, llama3, qwen3"),
        ("llama3_tiny", {"prefix": ["dense"] * 5}, "at most n_layers (4) names"),
        (
            "llama3_tiny",
            {"blocks__dense__attention__n_kv_heads": 3},
            "attention.n_kv_heads=3: must be a divisor of n_heads (8)",
        ),
        (
            "llama3_tiny",
            {"blocks__dense__attention__head_dim": 7},
            "attention.head_dim=7: must be even, for rotation in pairs",
        ),
        (
            "llama3_tiny",
            {"blocks__dense__attention__rope__scaling__factor": 0.5},
            "rope.scaling.factor=0.5: must be at least 1",
        ),
        ("llama3_tiny", {"blocks__dense__mlp": None}, "exactly one of mlp, moe"),
        (
            "deepseek_v3_tiny",
            {"blocks__moe__moe__top_k": 9},
            "moe.top_k=9: must be 1 to 8, the experts of top_groups groups",
        ),
        (
            "deepseek_v3_tiny",
            {"blocks__moe__moe__router__n_groups": 3},
            "router.n_groups=3: must be a divisor of n_experts (16)",
        ),
        (
            "deepseek_v3_tiny",
            {"blocks__moe__moe__router__top_groups": 5},
            "router.top_groups=5: must be 1 to n_groups (4)",
        ),
    ],
)
def test_a_value_that_cannot_be_built_is_refused_in_one_line(name, change, message):
    with pytest.raises(ValueError) as caught:
        compose(name, **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ATTENTION, MLA, MOE = "blocks__dense__attention__", "blocks__moe__mla__", "blocks__moe__moe__"
SCALING = f"{ATTENTION}rope__scaling__"
WHOLE = [
    *(("llama3_tiny", ATTENTION + key) for key in ("n_heads", "n_kv_heads", "head_dim")),
    *(("llama3_tiny", key) for key in ("d_model", "n_layers", "vocab_size", "context")),
    *(("llama3_tiny", key) for key in ("blocks__dense__mlp__d_ff", f"{SCALING}original_context")),
    *(("deepseek_v3_tiny", MLA + key) for key in ("n_heads", "q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim")),
    *(("deepseek_v3_tiny", MOE + key) for key in ("n_experts", "top_k", "d_expert")),
    *(("deepseek_v3_tiny", f"{MOE}router__{key}") for key in ("n_groups", "top_groups")),
]
NUMBERS = [
    *(("llama3_tiny", key) for key in ("init_std", "norm__eps", f"{ATTENTION}rope__theta")),
    *(("llama3_tiny", SCALING + key) for key in ("factor", "low", "high")),
    ("qwen3_tiny", f"{ATTENTION}qk_norm__eps"),
    ("deepseek_v3_tiny", f"{MOE}router__scale"),
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


def test_the_families_are_those_that_transformers_has_a_class_for():
    assert set(FAMILIES) == {family.name for family in hf_config.FAMILIES}


def test_an_unknown_key_and_an_ill_typed_value_are_refused():
    with pytest.raises((OmegaConfBaseException, ConfigCompositionException), match="d_modle"):
        compose("llama3_tiny", d_modle=64)
    with pytest.raises((OmegaConfBaseException, ConfigCompositionException), match="wide"):
        compose("llama3_tiny", d_model="wide")
