"""Rotary fields of both spellings, scaled in every way that the zoo builds; what it does not build is named."""

import copy
import json
from typing import Any

import pytest
from models import compose
from transformers import AutoConfig

from zoo import hf
from zoo.config import ModelConfig
from zoo.config_mixer import RopeConfig
from zoo.hf_config import parse, render


def read(raw: dict[str, Any]) -> ModelConfig:
    """As we read it, and as we read what transformers makes of it."""
    config = parse(copy.deepcopy(raw), source="config.json")
    theirs = json.loads(json.dumps(AutoConfig.for_model(**copy.deepcopy(raw)).to_dict()))
    again = parse(theirs | {"architectures": raw["architectures"]}, source="config.json")
    assert [layer.attention for layer in again.layers] == [layer.attention for layer in config.layers]
    return config


def rope_of(config: ModelConfig, layer: int = 0) -> RopeConfig:
    attention = config.layers[layer].attention
    assert attention is not None and attention.rope is not None
    return attention.rope


def test_both_spellings_of_rotary_fields_mean_the_same():
    for name in ("llama31_8b", "deepseek_v3_671b"):
        older = render(compose(name))
        newer = {key: value for key, value in older.items() if key not in ("rope_theta", "rope_scaling")}
        newer["rope_parameters"] = older["rope_scaling"] | {"rope_theta": older["rope_theta"]}
        oldest = older | {
            "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in older["rope_scaling"].items()}
        }
        for raw in (older, newer, oldest):
            assert parse(raw, source="config.json").layers[-1].attention == compose(name).layers[-1].attention
            assert parse(raw, source="config.json").layers[-1].mla == compose(name).layers[-1].mla


def test_scaling_of_phases_without_that_of_the_softmax_is_read_as_transformers_reads_it():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    raw = render(compose("qwen3_8b")) | {"rope_scaling": scaling, "max_position_embeddings": 131072}
    attention = parse(raw, source="config.json").layers[0].attention
    assert attention is not None and attention.rope is not None and attention.rope.scaling is not None
    assert (attention.rope.scaling.mscale, attention.rope.scaling.mscale_all_dim) == (1.0, 0.0)
    assert (attention.rope.scaling.low, attention.rope.scaling.high) == (1.0, 32.0)


def test_yarn_at_rest_is_not_exported():
    tiny = compose("deepseek_v3_tiny")
    assert render(tiny)["rope_scaling"] is None
    assert render(compose("deepseek_v3_tiny", context=4097))["rope_scaling"]["rope_type"] == "yarn"


@pytest.mark.parametrize("scaling", [{"kind": "linear", "factor": 4}, None])
def test_scaling_by_a_plain_factor_and_none_survive(scaling):
    config = compose("llama3_tiny", blocks__dense__attention__rope__scaling=None)
    config.blocks["dense"] = compose("llama3_8b", blocks__dense__attention__rope__scaling=scaling).blocks["dense"]
    config.blocks["dense"].attention.n_heads = config.d_model // config.blocks["dense"].attention.head_dim
    config.blocks["dense"].attention.n_kv_heads = 1
    assert rope_of(read(render(config))).scaling == rope_of(config).scaling


def test_gemma_has_rotary_fields_of_both_types_of_layer_in_both_spellings():
    config = compose("gemma3_tiny")
    older = render(config)
    assert (older["rope_theta"], older["rope_local_base_freq"]) == (1e6, 1e4)
    newer = {key: value for key, value in older.items() if "rope" not in key}
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    newer["rope_parameters"] = {
        "full_attention": linear,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    for raw in (older, newer):
        assert [layer.attention for layer in read(raw).layers] == [layer.attention for layer in config.layers]
    newer["rope_parameters"]["sliding_attention"]["rope_theta"] = 77.0
    assert [rope_of(read(newer), i).theta for i in range(6)] == [77.0] * 5 + [1e6]
    del newer["rope_parameters"]["sliding_attention"]
    assert rope_of(read(newer)).theta == 10_000.0
    with pytest.raises(hf.HFError, match="rope_parameters: rope_theta=5: must be absent: there is one object for"):
        parse(newer | {"rope_parameters": {"rope_theta": 5}}, source="config.json")


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, None])
def test_gemma_with_scaled_windows_survives_in_the_newer_spelling(scaling):
    raw = {key: value for key, value in render(compose("gemma3_tiny")).items() if "rope" not in key}
    sliding = {"rope_type": "linear", "factor": 4.0, "rope_theta": 77.0}
    full = (scaling or {"rope_type": "default"}) | {"rope_theta": 5e5}
    raw["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    config = read(raw)
    assert [rope_of(config, i).scaling is None for i in (0, 5)] == [False, scaling is None]
    written = render(config)
    assert written["rope_parameters"] == raw["rope_parameters"]
    assert not written.keys() & {"rope_theta", "rope_scaling", "rope_local_base_freq"}
    assert read(written).layers == config.layers


@pytest.mark.parametrize("name", ["glm45_tiny", "qwen3_next_tiny"])
def test_a_head_that_turns_whole_says_so_where_its_class_would_turn_a_part(name):
    raw = render(compose(name)) | {"partial_rotary_factor": 1.0}
    config = read(raw)
    assert rope_of(config, -1).fraction == 1.0
    assert render(config)["partial_rotary_factor"] == 1.0
    assert rope_of(read(render(config)), -1).fraction == 1.0


def test_gpt_oss_is_scaled_unless_it_says_otherwise():
    scaled = render(compose("gpt_oss_tiny"))
    assert scaled["rope_scaling"]["truncate"] is False and "mscale" not in scaled["rope_scaling"]
    silent = {key: value for key, value in scaled.items() if key not in ("rope_scaling", "rope_theta")}
    for raw in (scaled, silent, silent | {"rope_parameters": None}):
        assert rope_of(read(raw)) == rope_of(compose("gpt_oss_tiny")) == rope_of(compose("gpt_oss_20b"))
    at_rest = compose("gpt_oss_tiny", context=4096)
    assert rope_of(read(render(at_rest))).scaling is None


def test_part_of_a_head_turns_where_a_family_has_that():
    raw = render(compose("glm45_tiny"))
    assert raw["partial_rotary_factor"] == 0.5
    assert rope_of(read(raw | {"partial_rotary_factor": 0.25})).fraction == 0.25
    del raw["partial_rotary_factor"]
    assert rope_of(read(raw)).fraction == 0.5
    inside = raw | {"rope_scaling": None, "rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 1.0}}
    assert (rope_of(read(inside)).fraction, rope_of(read(inside)).theta) == (1.0, 9.0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3_tiny", {"rope_scaling": {"type": "dynamic"}}, 'type="dynamic": must be one of'),
        (
            "llama3_tiny",
            {"rope_scaling": {"rope_type": "longrope"}},
            "must be one of ['default', 'linear', 'llama3',",
        ),
        ("llama3_tiny", {"rope_scaling": {"rope_type": "llama3"}}, "factor=absent: must be a number"),
        ("llama3_tiny", {"rope_scaling": {"rope_type": "default", "beta": 1}}, "beta=1: must be absent"),
        ("llama3_tiny", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5: must be at least 1"),
        ("llama3_tiny", {"rope_scaling": 5}, "rope_scaling=5: must be an object"),
        ("llama3_tiny", {"rope_theta": None}, "rope_theta=null: must be absent, which means 10000.0"),
        (
            "gpt_oss_tiny",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": None}},
            "rope_scaling: truncate=null: must be absent or have a value",
        ),
        ("llama3_tiny", {"rope_theta": 10**400}, "must be a number, and finite"),
        ("llama3_tiny", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: must be 1.0"),
        ("gemma3_tiny", {"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 'rope_type="dynamic": must be one of'),
        ("gemma3_tiny", {"rope_local_base_freq": "x"}, 'rope_local_base_freq="x": must be a number'),
        (
            "qwen3_tiny",
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8, "mscale": 1}
                | {"mscale_all_dim": 1}
            },
            "mscale_all_dim=1: must be 0 or absent but in MLA",
        ),
        (
            "gpt_oss_tiny",
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8}
                | {"attention_factor": 1.1}
            },
            "attention_factor=1.1: must be null",
        ),
        (
            "deepseek_v3_tiny",
            {"rope_scaling": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
            "max_position_embeddings=4096: must be above original_max_position_embeddings (4096), where YaRN acts",
        ),
    ],
)
def test_rotary_fields_that_the_zoo_does_not_build_are_refused(name, changes, message):
    with pytest.raises(hf.HFError) as caught:
        parse(render(compose(name)) | changes, source="config.json")
    assert message in str(caught.value), str(caught.value)
    assert str(caught.value).startswith("config.json") and "\n" not in str(caught.value)
