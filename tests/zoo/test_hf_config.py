"""``config.json`` survives transformers both ways, and what cannot be built or held is named."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from models import SHIPPED, compose
from transformers import AutoConfig

from zoo import hf
from zoo.decoder import Decoder
from zoo.hf_config import parse, render


@pytest.mark.parametrize("name", SHIPPED)
def test_the_config_of_every_shipped_model_survives_transformers(name, tmp_path):
    config = compose(name)
    AutoConfig.for_model(**render(config)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw  # theirs is the newer spelling, ours the older
    back = parse(raw, source="config.json")
    assert render(back) == render(config)
    assert back.layers[-1].mla == config.layers[-1].mla or config.context <= 4096  # where YaRN rests it is not written
    assert back.kinds == config.kinds


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
    assert attention is not None and attention.rope.scaling is not None
    assert (attention.rope.scaling.mscale, attention.rope.scaling.mscale_all_dim) == (1.0, 0.0)
    assert (attention.rope.scaling.low, attention.rope.scaling.high) == (1.0, 32.0)


def test_yarn_at_rest_is_not_exported():
    tiny = compose("deepseek_v3_tiny")
    assert render(tiny)["rope_scaling"] is None
    assert render(compose("deepseek_v3_tiny", context=4097))["rope_scaling"]["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3_tiny", {"hidden_act": "gelu"}, 'hidden_act="gelu": must be "silu"'),
        ("llama3_tiny", {"attention_bias": True}, "attention_bias=true: must be false"),
        ("llama3_tiny", {"mlp_bias": True}, "mlp_bias=true: must be false"),
        ("llama3_tiny", {"attention_dropout": 0.1}, "attention_dropout=0.1: must be 0.0"),
        ("llama3_tiny", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}: must be null'),
        (
            "llama3_tiny",
            {"model_type": "gpt2"},
            "model_type=\"gpt2\": must be one of ['deepseek_v3', 'llama', 'qwen3']",
        ),
        (
            "llama3_tiny",
            {"architectures": ["LlamaModel"]},
            'architectures=["LlamaModel"]: must be ["LlamaForCausalLM"]',
        ),
        ("llama3_tiny", {"hidden_size": "wide"}, 'hidden_size="wide": must be a whole number'),
        ("llama3_tiny", {"hidden_size": None}, "hidden_size=null: must be a whole number"),
        ("llama3_tiny", {"num_key_value_heads": 3}, "attention.n_kv_heads=3: must be a divisor of n_heads (8)"),
        ("llama3_tiny", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, 'rope_type="linear": must be one of'),
        ("llama3_tiny", {"rope_scaling": {"type": "dynamic"}}, 'type="dynamic": must be one of'),
        ("llama3_tiny", {"rope_scaling": {"rope_type": "llama3"}}, "factor=absent: must be a number"),
        ("llama3_tiny", {"rope_scaling": {"rope_type": "default", "beta": 1}}, "beta=1: must be absent"),
        ("llama3_tiny", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: must be 1.0"),
        ("qwen3_tiny", {"use_sliding_window": True}, "use_sliding_window=true: must be false"),
        ("qwen3_tiny", {"layer_types": ["sliding_attention"]}, "must be full_attention in every layer"),
        ("deepseek_v3_tiny", {"scoring_func": "softmax"}, 'scoring_func="softmax": must be "sigmoid"'),
        ("deepseek_v3_tiny", {"topk_method": "greedy"}, 'topk_method="greedy": must be "noaux_tc"'),
        ("deepseek_v3_tiny", {"norm_topk_prob": False}, "norm_topk_prob=false: must be true"),
        ("deepseek_v3_tiny", {"moe_layer_freq": 2}, "moe_layer_freq=2: must be 1"),
        ("deepseek_v3_tiny", {"n_shared_experts": 0}, "n_shared_experts=0: must be a whole number from 1"),
        ("llama3_tiny", {"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number from 1"),
        ("llama3_tiny", {"hidden_size": 2**40}, "hidden_size=1099511627776: must be a whole number from 1 to"),
        ("llama3_tiny", {"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN: must be a number, and finite"),
        ("llama3_tiny", {"rope_theta": 10**400}, "must be a number, and finite"),
        ("llama3_tiny", {"model_type": ["a"]}, 'model_type=["a"]: must be one of'),
        ("llama3_tiny", {"layer_types": 5}, "layer_types=5: must be full_attention in every layer"),
        ("deepseek_v3_tiny", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1: must be a whole number from 0"),
        ("deepseek_v3_tiny", {"num_key_value_heads": 2}, "num_key_value_heads=2: must be num_attention_heads (4)"),
        (
            "deepseek_v3_tiny",
            {"rope_scaling": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
            "max_position_embeddings=4096: must be above original_max_position_embeddings (4096), where YaRN acts",
        ),
    ],
)
def test_a_config_that_the_zoo_does_not_build_is_refused(tmp_path, name, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(render(compose(name)) | changes))
    with pytest.raises(hf.HFError) as caught:
        hf.read_config(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama31_8b", "qwen3_tiny", "deepseek_v3_671b"])
def test_a_field_of_any_value_is_read_or_refused(name):
    raw = render(compose(name)) | {"layer_types": None, "rope_parameters": None}
    scaling = raw["rope_scaling"] or {}
    changed = [raw | {key: value} for key in raw for value in WRONG]
    changed += [{other: raw[other] for other in raw if other != key} for key in raw]
    changed += [raw | {"rope_scaling": scaling | {key: value}} for key in [*scaling, "type"] for value in WRONG]
    changed += [raw | {"rope_scaling": None, "rope_parameters": {"rope_theta": value}} for value in WRONG]
    read = 0
    for one in changed:
        try:
            config = parse(one, source="config.json")
        except hf.HFError as error:
            assert str(error).startswith("config.json: ") and "\n" not in str(error)
        else:
            assert config.kinds and asdict(config)
            read += 1
    assert read > len(raw)  # fields that say nothing of the model, and absent ones


WRONG: list[Any] = [None, True, "x", "", -1, 0, 1, 3, 0.5, 2**31, 10**400, math.nan, math.inf, [], ["x"], {}, {"x": 1}]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3_tiny", {"n_mtp": 1}, "model.n_mtp=1: must be 0, all that LlamaForCausalLM can hold"),
        ("llama3_tiny", {"d_model": 257}, "model.d_model=257: must be a multiple of n_heads (8)"),
        (
            "llama3_tiny",
            {"blocks__dense__attention__rope__interleaved": True},
            "model.layers.0.attention.rope.interleaved=True: must be False",
        ),
        ("qwen3_tiny", {"blocks__dense__attention__qk_norm__eps": 1e-5}, "qk_norm.eps=1e-05: must be 1e-06"),
        ("deepseek_v3_tiny", {"blocks__moe__moe__d_shared": 96}, "layers.1.moe.d_shared=96: must be 64"),
        ("deepseek_v3_tiny", {"blocks__dense__mla__norm__eps": 1e-5}, "layers.0.mla.norm.eps=1e-05: must be 1e-06"),
        ("deepseek_v3_tiny", {"prefix": [], "cycle": ["dense", "moe"]}, "model.layers.1.mlp=None: must be {"),
        ("deepseek_v3_tiny", {"cycle": ["dense"]}, "model.blocks.dense: must have mla and moe"),
    ],
)
def test_a_model_that_transformers_cannot_hold_is_refused(tmp_path, name, changes, message):
    config = compose(name, **changes)
    with torch.device("meta"):
        model = Decoder(config)
    with pytest.raises(hf.HFError) as caught:
        hf.save(model, tmp_path / "out")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
