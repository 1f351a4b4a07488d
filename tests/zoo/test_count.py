"""Counting from a config equals counting what is built, here and by transformers, and what was published."""

from dataclasses import replace

import pytest
import torch
from models import PUBLISHED, SHIPPED, compose
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from zoo.count import cache_per_token, flops_per_token, kv_bytes_per_token, parameters
from zoo.decoder import Decoder
from zoo.hf_config import render

# Published totals and active parameters in billions, and by how much our exact count may differ. From the survey of
# published architectures (shared/architectures.yaml): Llama github meta-llama/llama-models MODEL_CARD.md and arXiv
# 2407.21783; Qwen3 model cards; DeepSeek-V3 README_WEIGHTS.md, whose 36.7B active counts the head and no embedding.
PUBLISHED_BILLIONS = {
    "llama3_8b": (8.0, 8.0, 0.005),
    "llama3_70b": (70.0, 70.0, 0.008),
    "llama31_8b": (8.0, 8.0, 0.005),
    "llama31_70b": (70.0, 70.0, 0.008),
    "llama31_405b": (405.0, 405.0, 0.003),
    "llama32_1b": (1.23, 1.23, 0.005),
    "qwen3_06b": (0.6, 0.6, 0.007),
    "qwen3_17b": (1.7, 1.7, 0.013),  # 1.72, named by one digit
    "qwen3_4b": (4.0, 4.0, 0.006),
    "qwen3_8b": (8.2, 8.2, 0.002),
    "qwen3_14b": (14.8, 14.8, 0.003),
    "qwen3_32b": (32.8, 32.8, 0.002),
    "deepseek_v3_671b": (671.0, 36.7, 0.003),
}

# Exact totals of the same survey, which checked them against transformers.
EXACT = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "qwen3_06b": 596_049_920,
    "qwen3_17b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "deepseek_v3_671b": 671_026_404_352,
}


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


@pytest.mark.parametrize("name", SHIPPED)
def test_parameters_equal_those_of_transformers(name):
    config = compose(name)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**render(config)))
    assert parameters(config).total == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_figures(name):
    counted = parameters(compose(name))
    assert counted.total == EXACT[name]
    total, active, off = PUBLISHED_BILLIONS[name]
    assert counted.total == pytest.approx(total * 1e9, rel=off)
    moe = counted.active != counted.total
    assert (counted.active_without_embed if moe else counted.active) == pytest.approx(active * 1e9, rel=off)


def test_active_and_multi_token_parameters_of_deepseek_v3_are_the_published_ones():
    counted = parameters(compose("deepseek_v3_671b"))
    assert counted.active == 37_552_282_624
    assert counted.active_without_embed == 36_625_603_584
    assert counted.active_body == 35_698_924_544
    assert counted.body == 669_173_046_272
    assert counted.mtp == 11_610_067_968  # README_WEIGHTS.md: 11.5B
    assert counted.mtp_active == 688_100_352


def test_a_tied_embedding_counts_once_and_stays_active():
    tied = parameters(compose("llama3_tiny", tied=True))
    untied = parameters(compose("llama3_tiny"))
    assert tied.head == 0
    assert untied.total - tied.total == 4096 * 256
    assert tied.active_without_embed == tied.active
    assert untied.active_without_embed == untied.active - 4096 * 256


@pytest.mark.parametrize("name", ["llama3_tiny", "qwen3_tiny"])
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


@pytest.mark.parametrize(
    ("name", "numbers"), [("deepseek_v3_671b", 35_136), ("llama3_70b", 163_840), ("llama31_405b", 258_048)]
)
def test_cache_is_the_published_size(name, numbers):
    config = compose(name)
    assert cache_per_token(config) == numbers
    assert kv_bytes_per_token(config, value_bytes=2) == 2 * numbers
