"""Rotary frequencies of the published sizes, at their true widths, equal those of transformers to the last bit.

The draws of test_parity.py have few pairs a head, and other bounds of YaRN than the published ones.
"""

import sys
from typing import Any

import pytest
import torch
import transformers
from models import PUBLISHED, compose
from transformers import AutoConfig

from zoo import rope
from zoo.config import ModelConfig
from zoo.hf_config import render

HAVE_A_CLASS = [name for name in PUBLISHED if not name.startswith(("grok2", "gpt2"))]  # GPT-2 has no rotary positions


@pytest.mark.parametrize("name", HAVE_A_CLASS)
def test_frequencies_and_the_factor_of_phases_equal_those_of_transformers(name):
    config = compose(name)
    theirs = rotary_of(config)
    checked = 0
    for block in config.blocks.values():
        mixer = block.attention or block.mla
        if mixer is not None and mixer.rope is not None:
            dim = block.attention.head_dim if block.attention is not None else block.mla.rope_dim
            got = rope.frequencies(mixer.rope, dim=dim, context=config.context, device=torch.device("cpu"))
            frequencies, factor = published(
                theirs, windowed=block.attention is not None and bool(block.attention.window)
            )
            assert torch.equal(got, frequencies)
            assert rope.phase_factor(mixer.rope, context=config.context) == pytest.approx(factor, rel=1e-12)
            checked += 1
    assert checked


def rotary_of(config: ModelConfig) -> torch.nn.Module:
    raw = render(config)
    module = sys.modules[getattr(transformers, raw["architectures"][0]).__module__]
    classes = [value for key, value in vars(module).items() if key.endswith("RotaryEmbedding") and "Vision" not in key]
    assert len(classes) == 1, f"{classes=}"
    return classes[0](AutoConfig.for_model(**raw))


def published(theirs: Any, *, windowed: bool) -> tuple[torch.Tensor, float]:
    """Frequencies and factor; Gemma 3 has two of each."""
    if hasattr(theirs, "inv_freq"):
        return theirs.inv_freq, theirs.attention_scaling
    kind = "sliding_attention" if windowed else "full_attention"
    return getattr(theirs, f"{kind}_inv_freq"), getattr(theirs, f"{kind}_attention_scaling")
