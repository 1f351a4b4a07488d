"""Initial values against an independent Philox and inverse, in parts of every form, and their statistics."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import compose

from zoo import init
from zoo.decoder import Decoder
from zoo.init import DECAY_RATES, fill_initial, initial, initialize

CONFIG = compose("qwen3_next_tiny", init__std=0.3, init__scale_residual=False, init__cutoff=None)
CUT = compose("qwen3_next_tiny", init__std=0.3, init__scale_residual=False, init__cutoff=1.5)
RANDOM = ["blocks.0.mixer.wq.weight", "blocks.1.moe.experts.down", "embed.weight", "blocks.0.mixer.log_decay"]


@st.composite
def parts(draw):
    """A shape and a range along each of its dims, some of them empty."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return torch.Size(shape), tuple(slice(*each) for each in ends)


@given(
    parts(), st.sampled_from([*RANDOM, "norm.weight", "head.bias"]), st.sampled_from([CONFIG, CUT]),
    st.integers(0, 2**40), st.sampled_from([1, 2, 7, 2**17]),
)  # fmt: skip
@example((torch.Size([3, 5]), (slice(0, 3), slice(1, 3))), RANDOM[0], CONFIG, 1, 2**17)  # runs that share a block
@settings(max_examples=200, deadline=None)
def test_a_part_is_the_wholes_part_whatever_the_chunks(drawn, name, config, seed, chunk):
    shape, part = drawn
    whole = initial(name, shape, config=config, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "CHUNK", chunk)
        assert torch.equal(initial(name, shape, config=config, seed=seed, part=part), whole[part])
        assert torch.equal(initial(name, shape, config=config, seed=seed), whole)


def test_large_parts_are_the_wholes_parts():
    shape = torch.Size([3, 257, 1021])  # several chunks that end anywhere
    whole = initial(RANDOM[0], shape, config=CUT, seed=5)
    for part in ((slice(1, 3), slice(None), slice(None)), (slice(None), slice(100, 203), slice(7, 1000))):
        assert torch.equal(initial(RANDOM[0], shape, config=CUT, seed=5, part=part), whole[part])


def test_a_target_keeps_its_strides_and_its_surroundings():
    shape, part = torch.Size([40, 30]), (slice(3, 33), slice(5, 25))
    base = torch.full((20, 60), math.nan, dtype=torch.float64)
    fill_initial(base[:, ::2].T, name=RANDOM[0], shape=shape, config=CONFIG, seed=2, part=part)
    assert torch.equal(base[:, ::2].T, initial(RANDOM[0], shape, config=CONFIG, seed=2)[part].double())
    assert base[:, 1::2].isnan().all()


@pytest.mark.parametrize("part", [None, (slice(0, 6, 2), slice(0, 4))])
def test_a_target_of_another_form_is_refused(part):
    with pytest.raises(AssertionError):
        fill_initial(torch.empty(3, 4), name=RANDOM[0], shape=torch.Size([6, 4]), config=CONFIG, seed=2, part=part)


def test_all_dtypes_start_alike():
    shape = torch.Size([64, 32])
    values = initial(RANDOM[0], shape, config=CONFIG, seed=2)
    for dtype in (torch.float64, torch.bfloat16):
        target = torch.empty(shape, dtype=dtype)
        fill_initial(target, name=RANDOM[0], shape=shape, config=CONFIG, seed=2)
        assert torch.equal(target, values.to(dtype))


def philox(counter, key):
    """Philox-4x64 of ten rounds, as its paper's table 2 and section 3.3 have it."""
    mask = 2**64 - 1
    x = [counter, 0, 0, 0]
    k0, k1 = key & mask, key >> 64
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k0, b & mask, (a >> 64) ^ x[3] ^ k1, a & mask]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & mask, k1 + 0xBB67AE8584CAA73B & mask
    return x


def test_each_number_is_its_place_in_the_counter_through_the_inverse():
    shape, seed, cut = torch.Size([7, 5]), 11, 1.5
    key = int.from_bytes(hashlib.sha256(f"{seed}/{RANDOM[0]}".encode()).digest()[:16], "little")
    words = [philox(1 + i // 4, key)[i % 4] for i in range(shape.numel())]
    uniform = [((word >> 12) + 0.5) / 2**52 for word in words]
    normal = NormalDist()
    outside = normal.cdf(-cut)
    expected = [
        (CONFIG, [0.3 * normal.inv_cdf(u) for u in uniform]),
        (CUT, [0.3 * normal.inv_cdf(outside + u * (1 - 2 * outside)) for u in uniform]),
    ]
    for config, values in expected:
        found = initial(RANDOM[0], shape, config=config, seed=seed).flatten().double()
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_the_outermost_words_are_finite_and_mirror_each_other():
    words = np.array([0, 2**64 - 1, 2**63 - 1, 2**63, 4095, 4096], dtype=np.uint64)
    uniform = init._uniform(words)
    assert uniform.tolist() == [2**-53, 1 - 2**-53, 0.5 - 2**-53, 0.5 + 2**-53, 2**-53, 3 * 2**-53]
    assert torch.special.ndtri(uniform)[:2].tolist() == pytest.approx([-8.2095, 8.2095], abs=1e-4)


@pytest.mark.parametrize("function", [torch.special.ndtri, torch.log])
def test_a_functions_value_does_not_depend_on_the_place(function):
    # in float64, before rounding to fp32 hides all but one difference of many millions
    numbers = torch.rand(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = function(numbers)
    for first in range(0, 4000, 3):
        for n in (1, 3, 8, 61):
            assert torch.equal(function(numbers[first : first + n].clone()), whole[first : first + n])


def distance(values, cdf):
    """Largest distance of the values' distribution from ``cdf``, times √n: above 1.95 once in 1000 (Kolmogorov)."""
    values = values.flatten().double().sort().values
    n = len(values)
    return ((cdf(values) - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)).item()


@pytest.mark.parametrize("config, cut", [(CONFIG, math.inf), (CUT, 1.5)])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_matrices_are_normal_and_end_at_the_cutoff(config, cut, seed):
    values = initial(RANDOM[0], torch.Size([700, 1000]), config=config, seed=seed)
    outside = 0.5 * math.erfc(cut / math.sqrt(2))
    assert distance(values, lambda x: (torch.special.ndtr(x / 0.3) - outside) / (1 - 2 * outside)) < 1.95
    inside = 1 - 2 * outside
    lost = 0.0 if cut == math.inf else 2 * cut * math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi) / inside
    assert values.mean().item() == pytest.approx(0, abs=5 * 0.3 / math.sqrt(values.numel()))
    assert values.square().mean().item() == pytest.approx(0.09 * (1 - lost), rel=6 / math.sqrt(values.numel()))
    if cut == math.inf:
        assert 4.2 < values.abs().max() / 0.3 < 6.5  # of 700,000
    else:
        assert 0.999 * 0.3 * cut < values.abs().max() <= torch.tensor(0.3 * cut)


def test_neighbours_along_every_dim_are_independent():
    values = initial(RANDOM[0], torch.Size([1000, 700]), config=CONFIG, seed=4) / 0.3
    for rows in (0, 1, 2):
        for columns in (0, 1, 2, 3, 4, 8):
            if rows or columns:
                product = values[: 1000 - rows, : 700 - columns] * values[rows:, columns:]
                assert abs(product.mean().item()) * math.sqrt(product.numel()) < 4.5


def test_names_and_seeds_give_unrelated_values():
    shape = torch.Size([200, 300])
    values = [
        initial(name, shape, config=CONFIG, seed=seed).flatten() / 0.3
        for name, seed in [
            (RANDOM[0], 1), (RANDOM[0], 2), (RANDOM[0], 2**32 + 1), (RANDOM[2], 1), ("blocks.1.mixer.wq.weight", 1)
        ]
    ]  # fmt: skip
    products = torch.stack(values) @ torch.stack(values).T / math.sqrt(shape.numel())
    assert products.fill_diagonal_(0).abs().max() < 4.5


def test_rates_of_decay_are_even_between_their_ends():
    rates = initial("blocks.0.mixer.log_decay", torch.Size([100_000]), config=CONFIG, seed=3).exp()
    low, high = DECAY_RATES
    assert distance(rates, lambda x: (x - low) / (high - low)) < 1.95


@pytest.mark.parametrize(
    "name, model, value",
    [
        ("blocks.0.mixer.dt_bias", "qwen3_next_tiny", 1),
        ("blocks.0.mixer.sinks", "gpt_oss_tiny", 0),
        ("blocks.0.mlp.down.bias", "gpt2_tiny", 0),
        ("norm.weight", "llama3_tiny", 1),
        ("norm.weight", "gemma3_tiny", 0),  # multiplies by 1 + weight
        ("blocks.0.mixer.q_norm.weight", "gemma3_tiny", 0),
        ("blocks.0.mixer.q_norm.weight", "qwen3_tiny", 1),
        ("blocks.0.mixer.kv_norm.weight", "deepseek_v3_tiny", 1),
    ],
)
def test_what_is_not_drawn_starts_neutral(name, model, value):
    assert initial(name, torch.Size([5]), config=compose(model), seed=1).tolist() == [value] * 5


def test_what_adds_to_the_residual_stream_starts_smaller():
    config = compose("gpt2_tiny", n_layers=8, init__std=0.02)
    stds = {
        name: initial(f"blocks.0.{name}", torch.Size([300, 300]), config=config, seed=1).std().item()
        for name in ("mixer.wo.weight", "mlp.down.weight", "moe.experts.down", "mixer.wq.weight", "mlp.up.weight")
    }
    expected = [0.02 / 4] * 3 + [0.02] * 2
    assert list(stds.values()) == pytest.approx(expected, rel=0.02)


def test_a_whole_model_is_filled_and_its_buffers_are_zero():
    config = compose("deepseek_v3_tiny")
    model = Decoder(config)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(math.nan if tensor.is_floating_point() else 7)
    initialize(model, config=config, seed=9)
    assert all(not buffer.any() for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial(name, parameter.shape, config=config, seed=9))
