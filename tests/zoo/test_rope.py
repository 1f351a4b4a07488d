import math

import pytest
import torch

from zoo.config import RopeConfig, RopeScalingConfig, Scaling
from zoo.rope import frequencies, rotation, softmax_factor

CPU = torch.device("cpu")
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
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # frequencies are fp32, as in transformers
    pull = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad((got * pull).sum(), x)[0],
        torch.autograd.grad((want * pull).sum(), x)[0],
        rtol=1e-6,
        atol=1e-6,
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
