"""The short causal convolution: torch's, and one document at a time."""

import pytest
import torch
import torch.nn.functional as F

from zoo.convolution import Convolution


def make(channels, *, taps, dtype=torch.float64):
    convolution = Convolution(channels, taps=taps).to(dtype)
    torch.nn.init.normal_(convolution.weight, generator=torch.Generator().manual_seed(0))
    return convolution


def draw(*shape, dtype=torch.float64):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def through(convolution, x, documents):
    y = convolution(x, documents=documents)
    return y, *torch.autograd.grad((y * y).sum(), [x, convolution.weight])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_it_is_torchs_depthwise_convolution_after_zeros(taps, length):
    convolution, x = make(5, taps=taps), draw(2, length, 5)
    padded = F.pad(x.mT, (taps - 1, 0))
    y = F.conv1d(padded, convolution.weight[:, None], groups=5).mT
    expected = y, *torch.autograd.grad((y * y).sum(), [x, convolution.weight])
    for found, right in zip(through(convolution, x, None), expected, strict=True):
        assert (found - right).abs().max() < 1e-12


def test_packed_documents_equal_separate_ones():
    lengths = [1, 3, 1, 1, 9, 2]
    convolution, x = make(3, taps=4), draw(2, sum(lengths), 3)
    numbers = torch.tensor([4, 9, 2, 8, 1, 3]).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    y = torch.cat([convolution(part, documents=None) for part in x.split(lengths, dim=1)], dim=1)
    expected = y, *torch.autograd.grad((y * y).sum(), [x, convolution.weight])
    for found, right in zip(through(convolution, x, numbers), expected, strict=True):
        assert (found - right).abs().max() < 1e-12


def test_its_example_holds():
    convolution = Convolution(1, taps=2).double()
    convolution.weight.data = torch.tensor([[10.0, 1.0]], dtype=torch.float64)  # a, b
    x = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)[None, :, None]
    y = convolution(x, documents=torch.tensor([[0, 0, 0, 1, 1]]))
    assert y.flatten().tolist() == [1, 12, 23, 4, 45]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_bf16_is_summed_in_fp32_and_rounded_once_however_the_weight_is_kept(kept):
    convolution, x = make(5, taps=4, dtype=torch.float32), draw(2, 9, 5, dtype=torch.bfloat16)
    rounded = make(5, taps=4, dtype=torch.float32)
    rounded.weight.data = convolution.weight.data.bfloat16().float()
    convolution.weight.data = convolution.weight.data.to(kept)
    wide = x.detach().float().requires_grad_()
    y = convolution(x, documents=None)
    expected = rounded(wide, documents=None)
    assert torch.equal(y, expected.bfloat16())
    pull = torch.ones_like(y)
    found = torch.autograd.grad(y, [x, convolution.weight], pull)
    right = torch.autograd.grad(expected, [wide, rounded.weight], pull.float())
    assert [each.dtype for each in found] == [torch.bfloat16, kept]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, right, strict=True))
