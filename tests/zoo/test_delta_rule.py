"""The gated delta rule: by chunks as token by token, and packed as one document at a time."""

import pytest
import torch
from torch.autograd import grad

from zoo.delta_rule import chunked, recurrent, unit

SHAPES = [  # B, T, G, R, K, V
    (1, 1, 1, 1, 4, 4),
    (2, 2, 2, 2, 4, 3),
    (1, 63, 2, 1, 8, 8),
    (2, 64, 1, 2, 8, 4),
    (3, 65, 2, 3, 4, 8),
    (2, 130, 2, 2, 8, 6),
    (1, 257, 1, 1, 4, 4),
]
ARGUMENTS = ("q", "k", "v", "beta", "decay")


def draw(B, T, G, R, K, V, *, seed=0, dtype=torch.float64, strength=1.0):
    """Arguments of the rule; decays reach exp(−2 · strength)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, G, K), (B, T, G, K), (B, T, G * R, V), (B, T, G * R), (B, T, G * R)]
    q, k, v, beta, decay = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    drawn = (q, k, v, beta.sigmoid(), -2 * strength * decay.sigmoid() ** 2)
    return {name: each.to(dtype).requires_grad_() for name, each in zip(ARGUMENTS, drawn, strict=True)}


def documents(B, T, *, seed=0, share=0.1):
    """Random starts, a ``share`` of all tokens; numbers that differ between neighbours and do not rise."""
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share
    return 1000 - 7 * starts.cumsum(1)


def through(rule, arguments, **others):
    """The outputs of a rule and the gradients of all its arguments under random weights of the outputs."""
    y = rule(**arguments, **others)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *grad((y * weights.to(y.dtype)).sum(), list(arguments.values()))]


def largest_difference(left, right):
    """Over outputs and gradients, each relative to its largest number."""
    pairs = zip(left, right, strict=True)
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3)).item() for a, b in pairs
    )


@pytest.mark.parametrize("share", [None, 0.05, 0.5, 1.0])  # 1: every document has one token
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_the_recurrence(shape, share):
    arguments = draw(*shape)
    packed = None if share is None else documents(*shape[:2], share=share)
    expected = through(recurrent, arguments, documents=packed)
    assert largest_difference(through(chunked, arguments, documents=packed), expected) < 1e-10


@pytest.mark.parametrize("chunk", [1, 2, 7, 32, 200])
def test_the_length_of_chunks_changes_nothing(chunk):
    arguments, packed = draw(2, 130, 1, 2, 4, 4), documents(2, 130)
    expected = through(recurrent, arguments, documents=packed)
    assert largest_difference(through(chunked, arguments, documents=packed, chunk=chunk), expected) < 1e-10


@pytest.mark.parametrize("share", [None, 0.05])
def test_chunks_in_fp32_stay_near_the_recurrence_in_float64(share):
    shape = (2, 257, 2, 2, 32, 32)
    packed = None if share is None else documents(*shape[:2], share=share)
    exact = through(recurrent, draw(*shape), documents=packed)
    # 24 bits over 257 steps; both forms stay below 3e-6 here
    assert largest_difference(through(chunked, draw(*shape, dtype=torch.float32), documents=packed), exact) < 2e-5
    assert largest_difference(through(recurrent, draw(*shape, dtype=torch.float32), documents=packed), exact) < 2e-5


@pytest.mark.parametrize("rule", [recurrent, chunked])
def test_packed_documents_equal_separate_ones(rule):
    lengths = [1, 1, 5, 70, 64, 1, 130, 3]
    arguments = draw(1, sum(lengths), 2, 2, 8, 4)
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    whole = rule(**arguments, documents=numbers)
    parts = {name: each.split(lengths, dim=1) for name, each in arguments.items()}
    alone = [rule(**{name: parts[name][i] for name in ARGUMENTS}, documents=None) for i in range(len(lengths))]
    assert (whole - torch.cat(alone, dim=1)).abs().max() < 1e-12
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed = grad((whole * weights).sum(), list(arguments.values()))
    separate = grad((torch.cat(alone, dim=1) * weights).sum(), list(arguments.values()))
    assert largest_difference(packed, separate) < 1e-12


def test_a_key_is_overwritten_and_read_back():
    """One head, no decay: with β 1 the state holds the last value of a key, with β ½ the mean of it and the new one."""
    k = torch.tensor([[1.0, 0], [0, 3], [2, 0], [1, 0]], dtype=torch.float64)[None, :, None]
    v = torch.tensor([[5.0], [7], [1], [9]], dtype=torch.float64)[None, :, None]
    beta = torch.tensor([1, 1, 1, 0.5], dtype=torch.float64)[None, :, None]
    for rule in (recurrent, chunked):
        y = rule(q=k, k=k, v=v, beta=beta, decay=torch.zeros_like(beta), documents=None)
        expected = torch.tensor([5, 7, 1, 5], dtype=torch.float64) * 2**-0.5
        assert torch.allclose(y.flatten(), expected, rtol=1e-5)  # keys are of length 1 but for the ε in their norm


@pytest.mark.parametrize("packed", [None, documents(1, 130)], ids=["whole", "packed"])
def test_strong_decays_leave_everything_finite(packed):
    arguments = draw(1, 130, 1, 2, 8, 8, dtype=torch.float32, strength=1000.0)
    assert arguments["decay"].sum(1).min() < -1e4  # beyond what exp can hold, either way
    exact = through(recurrent, draw(1, 130, 1, 2, 8, 8, strength=1000.0), documents=packed)
    found = through(chunked, arguments, documents=packed)
    assert all(each.isfinite().all() for each in found)
    # decays are differences of sums as large as 6e4 within a chunk, which fp32 holds to 4e-3
    assert largest_difference(found, exact) < 1e-2


def test_a_repeated_token_does_not_blow_up():
    """The system is then all ones below its diagonal; powers of it, as some inversions take them, reach 1e18."""
    arguments = draw(1, 128, 1, 1, 8, 8)
    arguments["k"] = arguments["k"].detach()[:, :1].expand(-1, 128, -1, -1).clone().requires_grad_()
    arguments["beta"] = torch.full((1, 128, 1), 0.999, dtype=torch.float64, requires_grad=True)
    arguments["decay"] = torch.full((1, 128, 1), -1e-4, dtype=torch.float64, requires_grad=True)
    exact = through(recurrent, arguments, documents=None)
    narrow = {name: each.detach().float().requires_grad_() for name, each in arguments.items()}
    found = through(chunked, narrow, documents=None)
    assert largest_difference(found[:-1], exact[:-1]) < 2e-5
    assert (found[-1] - exact[-1]).abs().max() < 2e-5  # of the decay: what it sums cancels to a thousandth


@pytest.mark.parametrize("rule", [recurrent, chunked])
def test_narrow_inputs_are_computed_wide_and_rounded_once(rule):
    shape = (2, 70, 2, 2, 8, 8)
    narrow = {name: each.detach().bfloat16() for name, each in draw(*shape).items()}
    y = rule(**narrow, documents=None)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, rule(**{name: each.float() for name, each in narrow.items()}, documents=None).bfloat16())


def test_a_vector_of_zeros_keeps_a_finite_direction():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    unit(x).sum().backward()
    assert torch.allclose(x.grad, torch.full((3,), 1e3, dtype=torch.float64))  # 1 / √1e-6
