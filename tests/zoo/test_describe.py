"""An architecture in words."""

from dataclasses import replace

import pytest
from models import compose

from zoo import describe


@pytest.mark.parametrize(
    ("prefix", "cycle", "n_layers", "drawn"),
    [
        (["a"], ["b", "b", "c"], 9, "a, 2 x (2 b, c), 2 b"),
        ([], ["a"], 4, "4 a"),
        ([], ["a"], 1, "a"),
        (["a", "a"], ["a"], 2, "2 a"),
        ([], ["a", "b"], 1, "a"),
    ],
)
def test_a_pattern_counts_repeats(prefix, cycle, n_layers, drawn):
    layer = compose("llama3_tiny").layers[0]
    blocks = dict.fromkeys("abc", layer)
    config = replace(compose("llama3_tiny"), prefix=prefix, cycle=cycle, n_layers=n_layers, blocks=blocks)
    assert describe.pattern(config) == drawn


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gpt2_124m", "dense", ["no rotary positions", "biases on queries, keys, values and output", "gelu of 3,072"]),
        ("gemma3_1b", "local", ["the last 512 positions", "1 key-value head of", "root of 256", "before and after"]),
        (
            "grok2_270b",
            "moe",
            ["0.7071 times the sum of geglu of 32,768 and 8 experts", "capped at 30", "1,024 (ratio)"],
        ),
        (
            "llama4_scout",
            "chunked",
            ["own chunk of 8,192", "after rotation (each head, without weight)", "their input"],
        ),
        ("olmo2_7b", "dense", ["all heads together", "after mixer and feed-forward"]),
        (
            "gpt_oss_20b",
            "local",
            ["a learned sink", "softmax of the chosen, with bias", "swiglu_clamped of 2,880 with"],
        ),
        ("qwen3_next_80b_a3b", "attention", ["output gated", "first 25% of a head", "a shared one of 512 with a gate"]),
        ("qwen3_next_80b_a3b", "delta", ["gated DeltaNet, 32 value heads of 128 on 16 key heads of 128"]),
    ],
)
def test_words_say_what_is_in_a_layer(name, kind, words):
    layer = compose(name).blocks[kind]
    said = "; ".join([describe.mixer(layer), describe.feed_forward(layer), describe.placement(layer)])
    assert [word for word in words if word not in said] == [], said
