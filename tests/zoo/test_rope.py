import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zoo.config_mixer import RopeConfig, RopeScalingConfig, Scaling
from zoo.rope import frequencies, phase_factor, rotation, softmax_factor

CPU = torch.device("cpu")
LLAMA32 = RopeScalingConfig(kind=Scaling.llama3, factor=32, original_context=8192, low=1, high=4)
SCOUT = RopeScalingConfig(kind=Scaling.llama3, factor=16, original_context=8192, low=1, high=1)
KIMI = RopeScalingConfig(kind=Scaling.yarn, factor=32, original_context=4096, low=1, high=1)
GPT_OSS = RopeScalingConfig(
    kind=Scaling.yarn, factor=32, original_context=4096, low=1, high=32, mscale_all_dim=0, truncate=False
)
SHORT = RopeScalingConfig(kind=Scaling.yarn, factor=4, original_context=5, low=1, high=32)  # not one turn of any pair
GEMMA = RopeScalingConfig(kind=Scaling.linear, factor=8)
DEEPSEEK = RopeScalingConfig(kind=Scaling.yarn, factor=40, original_context=4096, low=1, high=32)


def rotate_plainly(x, positions, theta, interleaved):
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        angle = positions[..., None].double() * theta ** (-2 * pair / x.shape[-1])
        out[..., pair] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., pair + half] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_its_gradient_equal_a_plain_one(interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)[..., 2:].requires_grad_()  # a view, as a part of a head is
    positions = torch.randint(0, 50, (2, 5))
    rope = RopeConfig(theta=100.0, interleaved=interleaved)
    got = rotation(rope, positions=positions, dim=6, context=64, dtype=torch.float64)(x)
    want = rotate_plainly(x, positions, 100.0, interleaved)
    torch.testing.assert_close(
        got, want, rtol=1e-6, atol=1e-5
    )  # frequencies are fp32, as in transformers, times positions up to 50
    pull = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad((got * pull).sum(), x)[0],
        torch.autograd.grad((want * pull).sum(), x)[0],
        rtol=1e-6,
        atol=1e-5,
    )


def test_rotated_products_depend_on_the_distance_alone():
    rope = RopeConfig(theta=10_000.0, interleaved=True)
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def product(i, j):
        def turned(x, position):
            return rotation(rope, positions=torch.tensor([[position]]), dim=16, context=64, dtype=torch.float64)(x)

        return (turned(q, i) * turned(k, j)).sum().item()

    assert product(3, 1) == pytest.approx(product(40, 38), rel=1e-9)


def test_yarn_acts_only_beyond_the_original_context():
    rope = RopeConfig(theta=10_000.0, scaling=DEEPSEEK)
    plain = RopeConfig(theta=10_000.0)
    short = frequencies(rope, dim=64, context=4096, device=CPU)
    assert torch.equal(short, frequencies(plain, dim=64, context=4096, device=CPU))
    assert softmax_factor(rope, context=4096) == 1.0
    long = frequencies(rope, dim=64, context=163_840, device=CPU)
    assert long[0] == short[0]
    assert long[-1] == pytest.approx(short[-1] / 40)
    assert softmax_factor(rope, context=163_840) == pytest.approx(1.873854, abs=1e-6)  # DeepSeek-V3, published code


def test_llama3_scaling_keeps_fast_turns_and_divides_slow_ones():
    scaling = RopeScalingConfig(kind=Scaling.llama3, factor=8, original_context=8192, low=1, high=4)
    rope = RopeConfig(theta=500_000.0, scaling=scaling)
    plain = frequencies(RopeConfig(theta=500_000.0), dim=128, context=131_072, device=CPU)
    scaled = frequencies(rope, dim=128, context=131_072, device=CPU)
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            assert after == before
        elif wavelength > 8192:
            assert after == pytest.approx(before / 8)
        else:
            smooth = (8192 / wavelength - 1) / 3
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before, rel=1e-5)


def theirs(rope, head_dim):
    """Frequencies and factor of the phases by transformers' functions."""
    s = rope.scaling
    fields = {"rope_theta": rope.theta, "partial_rotary_factor": rope.fraction, "rope_type": "default"}
    if s is not None:
        fields |= {
            "rope_type": s.kind.value,
            "factor": s.factor,
            "original_max_position_embeddings": s.original_context,
        }
        if s.kind is Scaling.llama3:
            fields |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
        if s.kind is Scaling.yarn:
            fields |= {"beta_slow": s.low, "beta_fast": s.high, "truncate": s.truncate}
            fields |= {"mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=fields, max_position_embeddings=131_072)
    return ROPE_INIT_FUNCTIONS[s.kind.value](config, CPU)


@pytest.mark.parametrize("scaling", [GEMMA, LLAMA32, SCOUT, DEEPSEEK, KIMI, GPT_OSS, SHORT])
@pytest.mark.parametrize("theta, head_dim, fraction", [(500_000.0, 128, 1.0), (10_000.0, 64, 0.25), (150.0, 24, 0.5)])
def test_frequencies_and_phases_are_those_of_transformers(scaling, theta, head_dim, fraction):
    rope = RopeConfig(theta=theta, fraction=fraction, scaling=scaling)
    got = frequencies(rope, dim=head_dim, context=131_072, device=CPU)
    want, factor = theirs(rope, head_dim)
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0)
    assert phase_factor(rope, context=131_072) == pytest.approx(factor, rel=1e-12)


def test_unscaled_frequencies_are_those_of_transformers_to_the_last_bit():
    rope = RopeConfig(theta=500_000.0, fraction=0.5)
    want = LlamaRotaryEmbedding.compute_default_rope_parameters(
        LlamaConfig(head_dim=64, rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"})
    )[0]
    assert torch.equal(frequencies(rope, dim=128, context=64, device=CPU), want)


def test_gpt_oss_carries_yarns_temperature_on_its_phases_alone():
    rope = RopeConfig(theta=150_000.0, scaling=GPT_OSS)
    assert phase_factor(rope, context=131_072) == pytest.approx(1.346574, abs=1e-6)  # transformers, gpt_oss
    assert softmax_factor(rope, context=131_072) == 1.0
    ones = torch.ones(1, 1, 1, 8, dtype=torch.float64)
    turned = rotation(rope, positions=torch.tensor([[0]]), dim=8, context=131_072, dtype=torch.float64)(ones)
    torch.testing.assert_close(turned, 1.346574 * ones, rtol=1e-6, atol=0)


def test_kimis_bounds_coincide_and_divide_sharply():
    rope = RopeConfig(theta=50_000.0, scaling=KIMI)
    plain = frequencies(RopeConfig(theta=50_000.0), dim=64, context=131_072, device=CPU)
    ratio = plain / frequencies(rope, dim=64, context=131_072, device=CPU)
    torch.testing.assert_close(ratio, torch.tensor([1.0] * 20 + [32.0] * 12))  # notes on Kimi K2: pairs 0 … 19 stay


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_fraction_of_a_head_turns_and_the_rest_passes(interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(0, 50, (2, 5))
    rope = RopeConfig(theta=100.0, fraction=0.375, interleaved=interleaved)
    rotate = rotation(rope, positions=positions, dim=16, context=64, dtype=torch.float64)
    got = rotate(x)
    want = rotate_plainly(x[..., :6], positions, 100.0, interleaved)
    torch.testing.assert_close(got[..., :6], want, rtol=1e-6, atol=1e-5)  # fp32 frequencies times positions up to 50
    assert torch.equal(got[..., 6:], x[..., 6:])
    assert torch.autograd.gradcheck(rotate, x)
