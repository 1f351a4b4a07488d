"""Counting from a config equals counting what is built, here and by transformers, and what was published."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from models import CONF, PUBLISHED, SHIPPED, compose
from torch.utils.flop_counter import FlopCounterMode

from zoo.count import Parameters, cache_of_row, cache_per_token, flops_per_token, kv_bytes_per_token, parameters
from zoo.decoder import Decoder
from zoo.hf_config import render

TABLE = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))
NO_CLASS = {"grok2_270b", "grok2_tiny"}  # for which transformers has none

# How far exact counts are from published figures (total, active), where by more than 1%. The survey explains each:
# names of one or two digits (Mistral 7B is 7.24B, SmolLM3 3B 3.08B, Qwen3 1.7B 1.72B, "3B active" 3.25B), vision towers
# counted in (Mistral Small, Scout), GLM-4.5's active parameters rounded down, and Kimi K2's 1.04T, which takes all 61
# layers for expert layers where the released configuration has one dense.
ROUNDED = {
    "mistral_7b": (0.035, 0.035),
    "mistral_small_24b": (0.018, 0.018),
    "llama4_scout": (0.012, 0.011),
    "llama4_maverick": (0.002, 0.011),
    "qwen3_17b": (0.013, 0.013),
    "qwen3_30b_a3b": (0.002, 0.017),
    "smollm3_3b": (0.026, 0.026),
    "kimi_k2_1t": (0.014, 0.009),
    "glm45_355b": (0.001, 0.016),
    "glm45_air_106b": (0.004, 0.016),
    "qwen3_next_80b_a3b": (0.005, 0.085),
}


def by_convention(counted: Parameters, convention: str) -> int:
    """A count as a publisher means it: with which of embedding, head and multi-token modules."""
    return {
        "total": counted.total,
        "total_noembed": counted.body,
        "total_noembed_plus_mtp": counted.body + counted.mtp,
        "active_all": counted.active,
        "active_no_input_embed": counted.active_without_embed,
        "active_noembed": counted.active_body,
        "active_noembed_plus_mtp": counted.active_body + counted.mtp_active,
    }[convention]


def test_every_size_has_its_published_figures():
    assert set(TABLE) == set(PUBLISHED)
    assert len(PUBLISHED) == 41


@pytest.mark.parametrize("name", SHIPPED)
def test_parameters_equal_those_of_the_built_model(name):
    config = compose(name)
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in Decoder(config).named_parameters()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    counted = parameters(config)
    assert counted.total == sum(sizes.values()) - mtp
    assert counted.mtp == mtp
    assert counted.embed == sizes["embed.weight"]
    assert counted.head == sizes.get("head.weight", 0)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in NO_CLASS])
def test_parameters_equal_those_of_transformers(name):
    config = compose(name)
    raw = render(config)
    with torch.device("meta"):
        theirs = transformers.AutoConfig.for_model(**raw | {"pad_token_id": None})  # some default to one beyond 4,096
        model = getattr(transformers, raw["architectures"][0])(theirs)
    text = [parameter.numel() for name, parameter in model.named_parameters() if ".vqmodel." not in name]
    assert parameters(config).total == sum(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_those_that_the_survey_computed_from_published_numbers(name):
    counted, theirs = parameters(compose(name)), TABLE[name]["parameters"]
    for key in ("total", "total_noembed", "active_all", "active_no_input_embed", "active_noembed"):
        assert by_convention(counted, key) == theirs[key], key
    assert (counted.embed, counted.head) == (theirs["embed"], theirs["head"])
    assert (counted.mtp, counted.mtp_active) == (theirs["mtp_unique"], theirs["mtp_active"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_by_the_publisher_s_convention(name):
    counted, said = parameters(compose(name)), TABLE[name]["published"]
    offs = ROUNDED.get(name, (0.01, 0.01))
    for key, off in zip(("total", "active"), offs, strict=True):
        if key in said:  # OLMo 2's names stand for no number, Grok's active parameters are unpublished
            assert by_convention(counted, said[f"compare_{key}"]) == pytest.approx(said[key], rel=off), key


def test_a_difference_above_one_percent_is_one_that_the_survey_explains():
    assert all("tolerance_note" in TABLE[name]["published"] for name in ROUNDED)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("_tiny")])
def test_a_tiny_model_has_about_the_parameters_that_its_file_says(name):
    counted = parameters(compose(name))
    said = re.search(r"about (\d)M parameters", (CONF / "model" / f"{name}.yaml").read_text("utf-8"))
    assert said is not None
    assert round((counted.total + counted.mtp) / 1e6) == int(said[1])


def test_a_tied_embedding_counts_once_and_stays_active():
    tied = parameters(compose("llama3_tiny", tied=True))
    untied = parameters(compose("llama3_tiny"))
    assert tied.head == 0
    assert untied.total - tied.total == 4096 * 256
    assert tied.active_without_embed == tied.active
    assert untied.active_without_embed == untied.active - 4096 * 256


def test_a_token_meets_grok_s_dense_feed_forward_and_two_of_its_experts():
    config = compose("grok2_tiny")
    counted = parameters(config)
    assert counted.total - counted.active == config.n_layers * 6 * 3 * 128 * 256


def test_biases_of_experts_that_a_token_does_not_meet_are_idle():
    config = compose("gpt_oss_tiny")
    counted = parameters(config)
    assert counted.total - counted.active == config.n_layers * 12 * (3 * 128 * 128 + 2 * 128 + 128)


@pytest.mark.parametrize("name", ["llama3_tiny", "qwen3_tiny", "gpt2_tiny", "olmo2_tiny", "smollm3_tiny"])
def test_flops_of_a_dense_model_equal_what_torch_counts(name):
    config, seq_len = compose(name), 16
    with torch.device("meta"):
        model, tokens = Decoder(config), torch.zeros(1, seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counted = flops_per_token(config, seq_len=seq_len)
    attention = counted.attention * 2 * seq_len // (seq_len + 1)  # torch counts masked keys too
    assert counter.get_total_flops() == seq_len * (counted.matmul + attention)


def test_flops_of_experts_count_those_that_are_chosen():
    config = compose("deepseek_v3_tiny")
    counted, flops = parameters(config), flops_per_token(config, seq_len=1024)
    norms = config.d_model * (2 * config.n_layers + 1) + config.n_layers * (96 + 64)
    assert flops.matmul == 6 * (counted.active_without_embed - norms)
    assert flops.attention == 3 * 1025 * config.n_layers * 4 * (32 + 16 + 32)
    mtp_norms = 5 * config.d_model + 96 + 64
    attention = 3 * 1025 * 4 * (32 + 16 + 32)
    assert flops.mtp == 6 * (counted.mtp_active - mtp_norms + counted.head) + attention
    assert flops.total == flops.matmul + flops.attention + flops.mtp
    assert flops_per_token(replace(config, n_mtp=0), seq_len=1024).mtp == 0


def pairs(sees, seq_len):
    """Pairs of a query i and a key j ≤ i that it sees, counted one by one."""
    return sum(sees(i, j) for i in range(seq_len) for j in range(i + 1))


@pytest.mark.parametrize("seq_len", [7, 32, 100, 128])
def test_flops_of_attention_count_the_keys_that_a_window_or_chunk_lets_through(seq_len):
    near, all_keys = pairs(lambda i, j: i - 32 < j, seq_len), pairs(lambda i, j: True, seq_len)
    width = 2 * 8 * 16
    gemma = flops_per_token(compose("gemma3_tiny"), seq_len=seq_len)  # 7 local layers with a window of 32, 1 global
    assert gemma.attention == 7 * (6 * width * near // seq_len) + 6 * width * all_keys // seq_len
    chunked = pairs(lambda i, j: i // 64 == j // 64, seq_len)
    llama = flops_per_token(compose("llama4_scout_tiny"), seq_len=seq_len)  # 3 layers in chunks of 64, 1 full
    assert llama.attention == 3 * (6 * width * chunked // seq_len) + 6 * width * all_keys // seq_len


def test_flops_of_delta_layers_do_not_grow_with_the_row():
    config = compose("qwen3_next_tiny")
    short, long = flops_per_token(config, seq_len=64), flops_per_token(config, seq_len=128)
    assert long.matmul == short.matmul
    one_layer = 6 * 2 * 8 * 32 // 2  # of attention; more keys, for one layer of the main model and one of depth 1
    assert long.attention - short.attention == 64 * one_layer
    assert long.mtp - short.mtp == 64 * one_layer
    state = 8 * 32 * 32
    assert short.attention - 65 * one_layer == 3 * 6 * 3 * state


def test_flops_count_the_convolutions_of_delta_layers():
    config = compose("qwen3_next_tiny")
    channels = 2 * 4 * 32 + 8 * 32
    longer = compose("qwen3_next_tiny", blocks__delta__deltanet__conv=5)
    more = flops_per_token(longer, seq_len=64).matmul - flops_per_token(config, seq_len=64).matmul
    assert more == 6 * 3 * channels  # 3 layers


# Of the survey, notes (a): all attention layers a token; DeltaNet's 36 layers keep a state instead.
CACHE = {
    "deepseek_v3_671b": 35_136,
    "kimi_k2_1t": 35_136,
    "llama3_70b": 163_840,
    "llama31_405b": 258_048,
    "qwen3_235b_a22b": 96_256,
    "glm45_355b": 188_416,
    "gpt_oss_120b": 36_864,
    "gemma3_27b": 253_952,
    "qwen3_next_80b_a3b": 12_288,
}


@pytest.mark.parametrize("name", CACHE)
def test_cache_is_the_published_size(name):
    config = compose(name)
    assert cache_per_token(config) == CACHE[name]
    assert kv_bytes_per_token(config, value_bytes=2) == 2 * CACHE[name]


@pytest.mark.parametrize(
    ("name", "unbounded"),
    [("gpt_oss_120b", 18_432), ("gemma3_27b", 40_960), ("llama3_70b", 163_840), ("mistral_7b", 0)],
)
def test_cache_of_a_row_grows_only_in_layers_that_see_all(name, unbounded):
    config = compose(name)
    assert cache_of_row(config, tokens=10) == 10 * cache_per_token(config)
    assert cache_of_row(config, tokens=100_001) - cache_of_row(config, tokens=100_000) == unbounded


def test_cache_of_a_row_holds_the_states_of_delta_layers():
    config = compose("qwen3_next_80b_a3b")
    state, inputs = 32 * 128 * 128, 3 * 8192  # the survey's 36x32x128x128, and what the convolutions reach back to
    assert cache_of_row(config, tokens=1000) == 1000 * 12_288 + 36 * (state + inputs)
