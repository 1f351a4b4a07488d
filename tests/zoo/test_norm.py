import pytest
import torch

from zoo.config import NormConfig
from zoo.norm import RMSNorm


def plain(x, weight, eps):
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)) * weight.double()


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_and_its_gradients_equal_a_plain_computation(dtype, error):
    torch.manual_seed(0)
    norm = RMSNorm(24, NormConfig(eps=1e-3))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 24).to(dtype).transpose(0, 1).requires_grad_()  # strided, as heads are
    pull = torch.randn(5, 3, 24).to(dtype)
    norm.to(dtype)
    got, want = norm(x), plain(x, norm.weight, 1e-3)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), want, rtol=error, atol=error)
    grads = torch.autograd.grad((got * pull).sum(), [x, norm.weight])
    expected = torch.autograd.grad((want * pull).sum(), [x, norm.weight])
    for each, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(each.double(), other.double(), rtol=error, atol=error * 5)


def test_a_weight_kept_in_fp32_multiplies_in_the_dtype_of_the_activations():
    norm = RMSNorm(8, NormConfig(eps=1e-5))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 8).bfloat16().requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert norm.weight.grad.dtype is torch.float32
