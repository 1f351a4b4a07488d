"""The table of what is shared, over every shipped model, and shares as arithmetic."""

import pytest
import torch
from models import SHIPPED, compose

from parallel.plan import TABLE, Kind, Share, find, key, share
from zoo.decoder import Decoder

ONE_OF_EACH = [name for name in SHIPPED if name.endswith("_tiny")]


def shapes(config):
    with torch.device("meta"):
        return {name: p.shape for name, p in Decoder(config).named_parameters()}


def experts(config):
    return max(layer.moe.n_experts for layer in config.layers if layer.moe is not None)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_parameter_of_every_model_matches_one_row(name):
    published = compose(name)
    n_layers = min(published.n_layers, len(published.prefix) + len(published.cycle))  # every kind of layer
    config = compose(name, n_layers=n_layers, prefix=published.prefix[:n_layers])
    for parameter, shape in shapes(config).items():
        row = find(parameter, config=config)  # asserts that it is one
        assert row.dim is None or row.dim < len(shape), parameter
        assert row.kind is Kind.expert or (row.dim is None) == (row.kind is Kind.whole), parameter
        assert (row.kind is Kind.expert) == (".experts." in parameter and shape[0] == experts(config)), parameter


def test_every_row_is_used_by_a_shipped_model():
    models = {name: compose(name) for name in (*ONE_OF_EACH, "llama4_scout", "deepseek_v2_236b")}
    used = {find(name, config=config).pattern for config in models.values() for name in shapes(config)}
    unused = {row.pattern for row in TABLE} - used
    assert unused <= {"moe.shared.down.bias"}, unused


def test_names_tell_mixers_and_scopes_apart():
    assert key("blocks.0.mixer.q_norm.weight", config=compose("qwen3_tiny")) == "attention.q_norm.head.weight"
    assert key("blocks.0.mixer.q_norm.weight", config=compose("olmo2_tiny")) == "attention.q_norm.width.weight"
    assert key("blocks.1.mixer.k_norm.bias", config=compose("chameleon_tiny")) == "attention.k_norm.own.bias"
    v3 = compose("deepseek_v3_tiny")
    assert key("mtp.0.block.mixer.q_norm.weight", config=v3) == "mla.q_norm.weight"
    assert key("mtp.0.proj.weight", config=v3) == "mtp.proj.weight"
    assert key("blocks.0.mixer.wq.weight", config=compose("qwen3_next_tiny")) == "deltanet.wq.weight"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_shares_cover_each_parameter_once(name, size):
    config = compose(name)
    for parameter, shape in shapes(config).items():
        found = [share(parameter, shape, config=config, size=size, rank=rank) for rank in range(size)]
        dim, n = found[0].dim, 0 if found[0].dim is None else shape[found[0].dim]
        counted = [torch.arange(n)[each.part] for each in found if each.first]
        assert torch.equal(torch.cat(counted), torch.arange(n)), parameter
        assert all(each.whole([1] * len(shape)) == [n if d == dim else 1 for d in range(len(shape))] for each in found)


def test_few_key_heads_are_copied_to_neighbours():
    config = compose("llama3_tiny")  # 8 heads, 2 of keys, 32 wide
    parts = [share("blocks.0.mixer.wk.weight", (64, 256), config=config, size=4, rank=rank) for rank in range(4)]
    assert [each.part for each in parts] == [slice(0, 32), slice(0, 32), slice(32, 64), slice(32, 64)]
    assert [each.first for each in parts] == [True, False, True, False]
    queries = [share("blocks.0.mixer.wq.weight", (256, 256), config=config, size=4, rank=rank) for rank in range(4)]
    assert [each.part for each in queries] == [slice(0, 64), slice(64, 128), slice(128, 192), slice(192, 256)]


def test_a_vocabulary_need_not_divide():
    rows = [Share(0, n=10, pieces=4, copies=1, rank=rank).part for rank in range(4)]
    assert rows == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
