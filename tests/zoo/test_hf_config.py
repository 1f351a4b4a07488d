"""``config.json`` survives transformers both ways, and what cannot be built or held is named."""

import copy
import json
import math
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from models import SHIPPED, compose
from transformers import AutoConfig

from zoo import hf
from zoo.config import expanded
from zoo.config_mixer import RopeScalingConfig, Scaling
from zoo.decoder import Decoder
from zoo.hf_config import parse, render

TINY = [name for name in SHIPPED if name.endswith("_tiny") and name != "grok2_tiny"]


def rendered(name: str, **changes: object) -> dict[str, Any]:
    """What we write, as JSON makes it."""
    return json.loads(json.dumps(render(compose(name, **changes))))


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("grok2")])
def test_the_config_of_every_shipped_model_survives_transformers(name, tmp_path):
    config = compose(name)
    AutoConfig.for_model(**rendered(name)).save_pretrained(tmp_path)
    back = parse(json.loads((tmp_path / "config.json").read_text()), source="config.json")
    assert render(back) == render(config)
    assert (back.n_layers, len(back.prefix), len(back.cycle)) == (
        len(back.kinds),
        len(config.prefix),
        len(config.cycle),
    )
    for ours, theirs in zip(config.layers, back.layers, strict=True):
        rests = config.context <= 4096  # where YaRN rests it is not written
        assert rests or (theirs.attention, theirs.mla, theirs.deltanet) == (ours.attention, ours.mla, ours.deltanet)
        assert theirs.mlp == ours.mlp
        assert (theirs.pre_norm, theirs.post_norm) == (ours.pre_norm, ours.post_norm)


@pytest.mark.parametrize("name", TINY)
def test_an_absent_field_means_what_transformers_takes_it_for(name):
    raw = rendered(name)
    for key in raw.keys() - {"model_type", "architectures"}:
        without = {other: raw[other] for other in raw if other != key}
        for rest in (without, raw | {key: None}):
            try:
                ours = parse(copy.deepcopy(rest), source="config.json")
            except hf.HFError as error:
                assert rest is not without or key in NEEDED or SIZES.search(str(error)), str(error)
                continue
            try:
                theirs = AutoConfig.for_model(**copy.deepcopy(rest)).to_dict()
            except StrictDataclassFieldValidationError:  # null, of a field that is not to be null
                continue
            theirs = json.loads(json.dumps(theirs)) | {"architectures": raw["architectures"]}
            assert expanded(parse(theirs, source="config.json")) == expanded(ours), key


SIZES = re.compile("head_dim=6: must be even|n_kv_heads=32: must be a divisor|num_key_value_heads=128: must be num_att")
"""Of a default that does not go together with a tiny model's sizes."""
NEEDED = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"}
NEEDED |= {"n_embd", "n_layer", "n_head", "n_positions", "rms_norm_eps", "intermediate_size", "intermediate_size_mlp"}
NEEDED |= {"num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"}
NEEDED |= {"n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace", "n_group", "topk_group"}
NEEDED |= {"kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "routed_scaling_factor"}
NEEDED |= {f"linear_{name}" for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}


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
            {"model_type": "bert"},
            "model_type=\"bert\": must be one of ['chameleon', 'deepseek_v2', 'deepseek_v3', 'gemma3_text', 'glm4_moe'",
        ),
        (
            "llama3_tiny",
            {"architectures": ["LlamaModel"]},
            'architectures=["LlamaModel"]: must be ["LlamaForCausalLM"]',
        ),
        ("llama3_tiny", {"hidden_size": "wide"}, 'hidden_size="wide": must be a whole number'),
        ("llama3_tiny", {"hidden_size": None}, "hidden_size=null: must be a whole number"),
        ("llama3_tiny", {"num_key_value_heads": 3}, "attention.n_kv_heads=3: must be a divisor of n_heads (8)"),
        ("llama3_tiny", {"is_causal": False}, "is_causal=false: must be true"),
        ("gpt2_tiny", {"is_causal": None}, "is_causal=null: must be absent, which means true"),
        ("deepseek_v3_tiny", {"norm_topk_prob": None}, "norm_topk_prob=null: must be absent, which means true"),
        ("deepseek_v3_tiny", {"rope_interleave": None}, "rope_interleave=null: must be absent, which means true"),
        ("deepseek_v3_tiny", {"num_nextn_predict_layers": None}, "num_nextn_predict_layers=null: must be absent"),
        ("deepseek_v3_tiny", {"head_dim": 8}, "head_dim=8: must be absent or qk_rope_head_dim ("),
        ("deepseek_v3_tiny", {"head_dim": None}, "head_dim=null: must be absent or qk_rope_head_dim ("),
        ("deepseek_v2_tiny", {"topk_method": None}, 'topk_method=null: must be absent, which means "greedy"'),
        ("llama4_scout_tiny", {"attention_chunk_size": None}, "attention_chunk_size=null: must be absent, which means"),
        ("glm45_tiny", {"partial_rotary_factor": None}, "partial_rotary_factor=null: must be absent, which means 0.5"),
        ("qwen3_tiny", {"use_sliding_window": True}, "use_sliding_window=true: must be false"),
        ("deepseek_v3_tiny", {"scoring_func": "softmax"}, 'scoring_func="softmax": must be "sigmoid"'),
        ("deepseek_v3_tiny", {"topk_method": "greedy"}, 'topk_method="greedy": must be "noaux_tc"'),
        ("deepseek_v3_tiny", {"moe_layer_freq": 2}, "moe_layer_freq=2: must be 1"),
        ("deepseek_v3_tiny", {"n_shared_experts": 0}, "n_shared_experts=0: must be a whole number from 1"),
        ("llama3_tiny", {"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number from 1"),
        ("llama3_tiny", {"hidden_size": 2**40}, "hidden_size=1099511627776: must be a whole number from 1 to"),
        ("llama3_tiny", {"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN: must be a number, and finite"),
        ("llama3_tiny", {"model_type": ["a"]}, 'model_type=["a"]: must be one of'),
        ("deepseek_v3_tiny", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1: must be a whole number from 0"),
        ("deepseek_v3_tiny", {"num_key_value_heads": 2}, "num_key_value_heads=2: must be num_attention_heads (4)"),
        ("gpt2_tiny", {"activation_function": "relu"}, 'activation_function="relu": must be "gelu_new"'),
        ("gpt2_tiny", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true: must be false"),
        ("deepseek_v2_tiny", {"norm_topk_prob": True}, "norm_topk_prob=true: must be false"),
        ("deepseek_v2_tiny", {"topk_method": "noaux_tc"}, 'topk_method="noaux_tc": must be "greedy" or "group_limited'),
        ("olmo2_tiny", {"attention_bias": True}, "attention_bias=true: must be false"),
        ("gemma3_tiny", {"hidden_activation": "gelu"}, 'hidden_activation="gelu": must be "gelu_pytorch_tanh"'),
        ("gemma3_tiny", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: must be null"),
        ("gemma3_tiny", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true: must be false"),
        ("gemma3_tiny", {"model_type": "gemma3"}, 'model_type="gemma3": must be "gemma3_text", the text model alone'),
        ("mistral_small_tiny", {"model_type": "mistral3"}, 'must be "mistral", the text model alone: images are not'),
        ("llama4_scout_tiny", {"model_type": "llama4"}, 'must be "llama4_text", the text model alone'),
        ("llama4_scout_tiny", {"attention_bias": True}, "attention_bias=true: must be false"),
        ("qwen3_moe_tiny", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: must be 1"),
        ("qwen3_moe_tiny", {"mlp_only_layers": [0]}, "mlp_only_layers=[0]: must be []"),
        ("gpt_oss_tiny", {"swiglu_limit": 5.0}, "swiglu_limit=5.0: must be 7.0"),
        ("gpt_oss_tiny", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config={"),
        ("glm45_tiny", {"hidden_act": "gelu"}, 'hidden_act="gelu": must be "silu"'),
        ("qwen3_next_tiny", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2: must be 0 or 1"),
        ("llama3_tiny", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647: must be at most 65536"),
        ("mixtral_tiny", {"num_local_experts": 2**31 - 1}, "num_local_experts=2147483647: must be at most 65536"),
        ("qwen3_moe_tiny", {"num_experts": 2**31 - 1}, "num_experts=2147483647: must be at most 65536"),
        ("mixtral_tiny", {"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}, "config.json: asks for "),
        ("chameleon_tiny", {"swin_norm": True}, "swin_norm=true: must be false"),
        ("chameleon_tiny", {"architectures": ["ChameleonModel"]}, 'must be ["ChameleonForConditionalGeneration"]'),
    ],
)
def test_a_config_that_the_zoo_does_not_build_is_refused(tmp_path, name, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(render(compose(name)) | changes))
    with pytest.raises(hf.HFError) as caught:
        hf.read_config(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_every_family_refuses_attention_to_what_follows():
    for name in TINY:
        assert parse(rendered(name) | {"is_causal": True}, source="config.json") == parse(rendered(name), source="")
        with pytest.raises(hf.HFError, match="is_causal=false: must be true"):
            parse(rendered(name) | {"is_causal": False}, source="config.json")


def test_a_null_that_transformers_takes_for_false_or_none_is_read_so():
    for name, key in (("deepseek_v2_tiny", "norm_topk_prob"), ("qwen3_moe_tiny", "mlp_only_layers")):
        assert parse(rendered(name) | {key: None}, source="config.json") == parse(rendered(name), source="config.json")


def test_the_rotating_part_may_be_said_twice():
    raw = rendered("deepseek_v3_tiny")
    assert parse(raw | {"head_dim": raw["qk_rope_head_dim"]}, source="") == parse(raw, source="")


def test_a_choice_is_named_as_a_user_writes_it():
    config = compose("mistral_tiny")
    scaled = copy.deepcopy(config.blocks["dense"])
    assert scaled.attention is not None and scaled.attention.rope is not None
    scaled.attention.rope.scaling = RopeScalingConfig(kind=Scaling.linear, factor=2.0)
    mixed = replace(config, blocks=config.blocks | {"scaled": scaled}, cycle=["dense", "scaled"])
    message = r"layers.1.attention.rope.scaling={'kind': 'linear', 'factor': 2.0, .*}: must be None, all that Mistral"
    with pytest.raises(hf.HFError, match=message):
        render(mixed)


@pytest.mark.parametrize("name", TINY)
def test_a_field_of_any_value_is_read_or_refused(name):
    raw = rendered(name) | {"rope_parameters": None}
    scaling = raw.get("rope_scaling") or {}
    changed = [raw | {key: value} for key in raw for value in WRONG]
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
        ("llama3_tiny", {"family": "grok3"}, "model.family=grok3: must be one of ['chameleon', 'deepseek_v2', "),
        ("gpt2_tiny", {"family": "mixtral"}, "must have one of ['attention'] and one of ['moe'] in family mixtral"),
        ("gpt2_tiny", {"learned_positions": False}, "model.learned_positions=False: must be True"),
        ("gpt2_tiny", {"norm__eps": 1e-3, "norm__kind": "rms"}, "model.norm.kind=rms: must be layer"),
        ("olmo2_tiny", {"blocks__dense__pre_norm": True}, "layers.0.pre_norm=True: must be False"),
        (
            "gemma3_tiny",
            {"blocks__local__attention__scale_dim": 20.5},
            "scale_dim=20.5: must be a whole number for",
        ),
        ("mistral_tiny", {"blocks__dense__attention__softcap": 30.0}, "layers.0.attention.softcap=30.0: must be None"),
        ("mixtral_tiny", {"blocks__moe__moe__router__balance_rate": 0.1}, "router.balance_rate=0.0: must be None"),
        ("qwen3_moe_tiny", {"blocks__moe__moe__d_shared": 8}, "moe.d_shared=8: must be 0"),
        ("gpt_oss_tiny", {"blocks__local__attention__sinks": False}, "layers.0.attention.sinks=False: must be True"),
        ("glm45_tiny", {"blocks__moe__attention__out_bias": True}, "attention.out_bias=True: must be False"),
        ("qwen3_next_tiny", {"cycle": ["attention", "delta"]}, "model.n_mtp=1: must be 0 unless the last layer"),
        ("chameleon_tiny", {"blocks__dense__attention__head_dim": 8}, "layers.0.attention.head_dim=8: must be"),
        ("deepseek_v3_tiny", {"cycle": ["dense"]}, "model.n_mtp=1: must be 0 unless the last layer is full attention"),
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
