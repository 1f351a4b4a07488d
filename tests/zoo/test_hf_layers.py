"""Which layer has which parts: fields of a ``config.json`` that say it, or leave it to a rule."""

import copy
import dataclasses
import json
from typing import Any

import pytest
from models import compose
from transformers import AutoConfig

from zoo import hf
from zoo.config import BlockConfig, ModelConfig
from zoo.hf_config import parse, render


def read(raw: dict[str, Any]) -> ModelConfig:
    """As we read it, and as we read what transformers makes of it."""
    config = parse(copy.deepcopy(raw), source="config.json")
    theirs = json.loads(json.dumps(AutoConfig.for_model(**copy.deepcopy(raw)).to_dict()))
    again = parse(theirs | {"architectures": raw["architectures"]}, source="config.json")
    assert again.layers == config.layers
    return config


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def pattern(config: ModelConfig) -> str:
    """One letter a layer: w window, c chunk, d DeltaNet, n no positions, f full; upper case where it has experts."""

    def letter(layer: BlockConfig) -> str:
        attention = layer.attention
        if attention is None:
            return "d" if layer.deltanet is not None else "f"
        return "w" if attention.window else "c" if attention.chunk else "n" if attention.rope is None else "f"

    return "".join(letter(layer).upper() if layer.moe else letter(layer) for layer in config.layers)


@pytest.mark.parametrize(
    ("name", "drop", "changes", "want"),
    [
        ("gemma3_tiny", ["layer_types"], {"num_hidden_layers": 8}, "wwwwwfww"),
        ("gemma3_tiny", ["layer_types"], {"num_hidden_layers": 4, "sliding_window_pattern": 2}, "wfwf"),
        ("gpt_oss_tiny", ["layer_types"], {"num_hidden_layers": 3}, "WFW"),
        ("qwen3_next_tiny", ["layer_types"], {"num_hidden_layers": 5, "num_nextn_predict_layers": 0}, "DDDFD"),
        ("qwen3_next_tiny", ["layer_types"], {"num_hidden_layers": 4, "full_attention_interval": 2}, "DFDF"),
        ("smollm3_tiny", ["no_rope_layers", "layer_types"], {"num_hidden_layers": 5}, "fffnf"),
        ("smollm3_tiny", ["layer_types"], {"no_rope_layers": [0, 1, 1, 0]}, "nffn"),
        ("smollm3_tiny", ["no_rope_layers", "layer_types"], {"no_rope_layer_interval": 2}, "fnfn"),
        ("llama4_scout_tiny", ["no_rope_layers", "layer_types", "moe_layers"], {}, "CCCN"),
        ("llama4_scout_tiny", [], {"no_rope_layers": []}, "CCCN"),
        ("llama4_scout_tiny", ["moe_layers"], {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 8}, "cCcN"),
        ("llama4_maverick_tiny", [], {}, "cCcN"),
        ("llama4_maverick_tiny", [], {"moe_layers": []}, "cccn"),
        ("mistral_tiny", [], {"sliding_window": None}, "ffff"),
        ("mistral_tiny", ["sliding_window"], {}, "wwww"),
        ("mixtral_tiny", [], {"sliding_window": 7}, "WWWW"),
        ("deepseek_v2_tiny", [], {"first_k_dense_replace": 2}, "ffFF"),
        ("deepseek_v2_tiny", [], {"first_k_dense_replace": 99}, "ffff"),
        ("glm45_air_tiny", [], {"first_k_dense_replace": 0}, "FFFF"),
    ],
)
def test_layers_are_as_the_fields_or_the_class_of_transformers_say(name, drop, changes, want):
    config = read(without(render(compose(name)), *drop) | changes)
    assert pattern(config) == want
    assert read(render(config)).layers == config.layers


def test_a_window_that_is_not_given_is_what_the_class_has():
    raw = without(render(compose("mistral_tiny")), "sliding_window")
    attention = read(raw).layers[0].attention
    assert attention is not None and attention.window == 4096


def test_the_shortest_prefix_and_cycle_are_found():
    raw = render(compose("gemma3_tiny"))
    full, sliding = "full_attention", "sliding_attention"
    config = read(raw | {"num_hidden_layers": 6, "layer_types": [full, sliding, full, sliding, full, sliding]})
    assert (config.prefix, config.cycle) == ([], ["full_dense", "sliding_dense"])
    config = read(raw | {"num_hidden_layers": 4, "layer_types": [full, sliding, sliding, sliding]})
    assert (config.prefix, config.cycle) == (["full_dense"], ["sliding_dense"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3_tiny", {"layer_types": 5}, "layer_types=5: must be one name for each of 4 layers"),
        ("qwen3_tiny", {"layer_types": ["sliding_attention"] * 4}, "must be full_attention in every layer"),
        ("qwen3_tiny", {"layer_types": ["full_attention"] * 3}, "must be one name for each of 4 layers"),
        ("gpt_oss_tiny", {"layer_types": ["chunked_attention"] * 4}, "must be full_attention or sliding_attention"),
        (
            "qwen3_next_tiny",
            {"layer_types": ["sliding_attention"] * 4},
            "must be full_attention or linear_attention",
        ),
        (
            "smollm3_tiny",
            {"layer_types": ["sliding_attention"] * 4},
            "full_attention where no_rope_layers is 1",
        ),
        ("smollm3_tiny", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]: must be 0 or 1 for each of 4 layers"),
        ("smollm3_tiny", {"no_rope_layers": [2, 0, 1, 1]}, "must be 0 or 1 for each of 4 layers"),
        ("llama4_scout_tiny", {"no_rope_layers": [0, 0, 0, 0]}, "must be chunked_attention where no_rope_layers is 1"),
        ("llama4_scout_tiny", {"attention_chunk_size": 0}, "attention_chunk_size=0: must be a whole number from 1"),
        ("llama4_scout_tiny", {"moe_layers": [4]}, "moe_layers=[4]: must be a list of layers from 0 to 3"),
        ("mistral_tiny", {"sliding_window": 0}, "sliding_window=0: must be a whole number from 1"),
        ("mixtral_tiny", {"layer_types": ["sliding_attention"] * 4}, "must be full_attention in every layer"),
        (
            "mistral_tiny",
            {"layer_types": ["full_attention"] * 4},
            "must be absent: with it transformers builds another",
        ),
        (
            "mistral_tiny",
            {"layer_types": None},
            "layer_types=null: must be absent: with it transformers builds another",
        ),
        ("gemma3_tiny", {"layer_types": None, "sliding_window_pattern": None}, "sliding_window_pattern=null: must be"),
        ("smollm3_tiny", {"no_rope_layers": None, "no_rope_layer_interval": None}, "no_rope_layer_interval=null: must"),
        ("llama4_scout_tiny", {"moe_layers": None, "interleave_moe_layer_step": None}, "moe_layer_step=null: must be"),
    ],
)
def test_layers_that_the_zoo_does_not_build_are_refused(name, changes, message):
    with pytest.raises(hf.HFError) as caught:
        parse(render(compose(name)) | changes, source="config.json")
    assert message in str(caught.value), str(caught.value)


def test_windows_that_differ_from_layer_to_layer_are_refused_where_a_class_has_one():
    config = compose("mistral_tiny")
    blocks = config.blocks | {"wide": compose("mistral_small_tiny").blocks["dense"]}
    mixed = dataclasses.replace(config, blocks=blocks, cycle=["dense", "wide"])
    with pytest.raises(hf.HFError, match=r"layers.1.attention.\w+=.*: must be .*, all that Mistral\w+ can hold"):
        render(mixed)
