"""The parts of a card's count are what the built model holds."""

import pytest
import torch
from models import PUBLISHED, SHIPPED, compose

from zoo.costs import BF16, SEQ_LEN, costs
from zoo.count import cache_of_row, cache_per_token, flops_per_token, parameters
from zoo.decoder import Decoder

PARTS = {  # of a parameter's name, the first that is in it
    "embed.": "embedding",
    "positions.": "learned positions",
    "head.": "head",
    "moe.router": "routers",
    "moe.shared": "shared experts",
    "moe.experts": "routed experts",
    "mlp.": "dense feed-forward",
    "": "mixers and norms",
}


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("_tiny")] + ["gpt2_124m"])
def test_parts_are_those_of_the_built_model(name):
    config = compose(name)
    with torch.device("meta"):
        sizes = {
            key: tensor.numel() for key, tensor in Decoder(config).named_parameters() if not key.startswith("mtp.")
        }
    held = dict.fromkeys(PARTS.values(), 0)
    for key, size in sizes.items():
        held[next(part for piece, part in PARTS.items() if piece in key)] += size
    assert dict(costs(config).parts) == {part: size for part, size in held.items() if size}


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_are_those_of_count(name):
    config, counted = compose(name), parameters(compose(name))
    c = costs(config)
    assert sum(size for _, size in c.parts) == c.parameters == counted.total
    assert (c.active, c.active_without_embed, c.mtp) == (counted.active, counted.active_without_embed, counted.mtp)
    assert c.cache == BF16 * cache_per_token(config)
    assert c.whole == BF16 * cache_of_row(config, tokens=config.context)
    assert c.flops == flops_per_token(config, seq_len=SEQ_LEN).total


@pytest.mark.parametrize(
    ("name", "growing", "kept"),
    [
        ("llama3_8b", 32 * 2 * 8 * 128, 0),
        ("mistral_7b", 0, 32 * 4096 * 2 * 8 * 128),
        ("gpt_oss_120b", 18_432, 18 * 128 * 1024),
        ("gemma3_27b", 40_960, 52 * 1024 * 4096),
        ("qwen3_next_80b_a3b", 12_288, 36 * (32 * 128 * 128 + 3 * 8192)),
    ],
)
def test_what_grows_with_the_text_and_what_does_not(name, growing, kept):
    c = costs(compose(name))
    assert (c.growing, c.kept) == (BF16 * growing, BF16 * kept)
