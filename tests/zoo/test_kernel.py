"""Kernels against the formula written out in float64, and against each other."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import kernel_flex, kernel_plain
from zoo.config_mixer import TemperatureConfig, TemperatureKind
from zoo.kernel import Kernel
from zoo.kernel_choice import KernelName, Needs, able, choose, lacks
from zoo.mask import Mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RATIO = TemperatureConfig(kind=TemperatureKind.ratio, floor=3)


def formula(kernel, q, k, v, mask, sinks=None):
    """Softmax attention head by head and query by query."""
    B, T, H, _ = q.shape
    dense = mask.part(queries=range(T), keys=range(T)).expand(B, -1, -1, -1)[:, 0]
    y = []
    for b in range(B):
        for h in range(H):
            scores = q[b, :, h] @ k[b, :, h * k.shape[2] // H].T * kernel.scale
            if kernel.softcap is not None:
                scores = kernel.softcap * torch.tanh(scores / kernel.softcap)
            if kernel.temperature is not None:
                floor = kernel.temperature.floor
                rows = [math.log(max(p, floor)) / math.log(floor) for p in mask.positions[b].tolist()]
                scores = scores * torch.tensor(rows, dtype=scores.dtype)[:, None]
            scores = scores.masked_fill(~dense[b], -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[h].expand(T, 1)], dim=-1)
            y.append(scores.softmax(-1)[:, :T] @ v[b, :, h * k.shape[2] // H])
    return torch.stack(y).view(B, H, T, -1).transpose(1, 2)


def draw(rows, *, heads=4, groups=2, width=8, v_width=6, seed=0, dtype=torch.float64):
    """Queries, keys, values and sinks of rows given as lengths of their documents, with documents and positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    B, T = len(rows), sum(rows[0])
    q, k, v = normal(B, T, heads, width), normal(B, T, groups, width), normal(B, T, groups, v_width)
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in rows])
    positions = torch.tensor([[t for n in row for t in range(n)] for row in rows])
    return q, k, v, normal(heads), documents, positions


def compare(kernel, q, k, v, mask, sinks, *, backward=True):
    given = {"sinks": sinks} if kernel.needs.sinks else {}
    inputs = [q, k, v, *given.values()]
    if not backward:
        inputs, given = [each.detach() for each in inputs], {name: each.detach() for name, each in given.items()}
    got, want = kernel(*inputs[:3], mask, **given), formula(kernel, *inputs[:3], mask, **given)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    if backward:
        pull = torch.randn_like(want)
        mine, exact = torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull)
        for each, other in zip(mine, exact, strict=True):
            torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(
    row=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bound=st.sampled_from(["none", "window", "chunk"]),
    size=st.integers(1, 12),
    alone=st.booleans(),
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    widths=st.sampled_from([(8, 8), (8, 5), (4, 7)]),
    slots=st.sets(st.sampled_from(["softcap", "temperature", "sinks"])),
    scores=st.sampled_from([1, 200, 2**24]),
    name=st.sampled_from([KernelName.plain, KernelName.sdpa]),
)
def test_plain_and_sdpa_equal_the_formula_with_all_gradients(
    row, bound, size, alone, heads, widths, slots, scores, name
):
    rows = [[sum(row)]] * 2 if alone else [row, row[::-1]]
    q, k, v, sinks, documents, positions = draw(
        rows, heads=heads[0], groups=heads[1], width=widths[0], v_width=widths[1]
    )
    mask = Mask(None if alone else documents, positions, **({} if bound == "none" else {bound: size}))
    slots = slots if name is KernelName.plain else set()
    kernel = Kernel(
        scale=0.6,
        width=widths[0],
        v_width=widths[1],
        softcap=1.5 if "softcap" in slots else None,
        temperature=RATIO if "temperature" in slots else None,
        has_sinks="sinks" in slots,
    )
    kernel.chosen = name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_plain, "SCORES", scores)  # 1: one query at a time
        compare(kernel, q, k, v, mask, sinks)


@pytest.mark.parametrize("bounds", [{}, {"window": 5}, {"chunk": 4}])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_formula_forward(bounds, alone, full):
    rows = [[19]] * 2 if alone else [[3, 10, 6], [12, 7]]
    q, k, v, sinks, documents, positions = draw(rows)
    slots = {"softcap": 1.5, "temperature": RATIO, "has_sinks": True} if full else {}
    kernel = Kernel(scale=0.6, width=8, v_width=6, **slots)
    kernel.chosen = KernelName.flex
    compare(kernel, q, k, v, Mask(None if alone else documents, positions, **bounds), sinks, backward=False)


def test_flex_compiles_once_for_a_kind_of_layer_and_once_for_all_lengths(monkeypatch):
    """New documents, positions and sinks in every batch are no reason to compile again."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    attend = torch.compile(flex_attention, backend=backend)
    monkeypatch.setattr(kernel_flex, "attention", lambda compiled: attend)
    kernel = Kernel(scale=0.6, width=8, v_width=6, softcap=1.5, temperature=RATIO, has_sinks=True)
    kernel.chosen = KernelName.flex
    for seed, row in enumerate([[9, 10], [4, 15], [1, 18], [30], [7, 30], [20, 21]]):
        q, k, v, sinks, documents, positions = draw([row, row[::-1]], seed=seed)
        compare(kernel, q, k, v, Mask(documents, positions, window=5), sinks, backward=False)
    assert len(compiled) == 2


def segments(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What ``varlen_attn`` does, by its documentation: each sequence on its own, ``window_size`` (left, right)."""
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype is torch.int32 and max_q == max_k
    assert enable_gqa == (q.shape[1] != k.shape[1]) and window_size[1] == 0
    out = torch.empty_like(q)
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        assert 0 < stop - start <= max_q
        T, left = stop - start, window_size[0]
        distance = torch.arange(T)[:, None] - torch.arange(T)
        allowed = (distance >= 0) & (distance <= (T if left == -1 else left))
        part = (each[start:stop].transpose(0, 1)[None] for each in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(*part, allowed, scale=scale, enable_gqa=enable_gqa)
        out[start:stop] = y[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("bounds", [{}, {"window": 5}, {"chunk": 4}])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("groups", [2, 4])
def test_varlen_asks_torch_for_the_formula(monkeypatch, bounds, alone, groups):
    from torch.nn.attention import varlen

    signature, calls = inspect.signature(varlen.varlen_attn), []

    def stub(*args, **kwargs):
        signature.bind(*args, **kwargs)
        calls.append(kwargs)
        return segments(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", stub)
    rows = [[19]] * 2 if alone else [[3, 10, 6], [12, 7]]
    q, k, v, _, documents, positions = draw(rows, v_width=8, groups=groups)
    kernel = Kernel(scale=0.6, width=8, v_width=8)
    kernel.chosen = KernelName.varlen
    compare(kernel, q, k, v, Mask(None if alone else documents, positions, **bounds), None, backward=False)
    assert len(calls) == 1


@pytest.mark.parametrize("bounds", [{}, {"window": 5}, {"chunk": 4}])
def test_varlen_of_torch_takes_what_it_is_given(bounds):
    """Forward and backward of its real operator, without numbers: it computes on CUDA alone."""
    q, k, v, _, documents, positions = draw([[3, 10, 6], [12, 7]], v_width=8, dtype=torch.bfloat16)
    kernel = Kernel(scale=0.6, width=8, v_width=8)
    kernel.chosen = KernelName.varlen
    inputs = [each.detach().to("meta").requires_grad_() for each in (q, k, v)]
    y = kernel(*inputs, Mask(documents, positions, **bounds))
    assert y.shape == q.shape and y.dtype is torch.bfloat16
    assert [each.shape for each in torch.autograd.grad(y.sum(), inputs)] == [each.shape for each in inputs]


def test_plain_keeps_no_scores_for_the_backward():
    q, k, v, sinks, documents, positions = draw([[300]], heads=2, groups=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        kernel_plain.plain(q, k, v, Mask(documents, positions), scale=1.0, sinks=sinks, softcap=5.0)[0].sum()
    assert kept and max(kept) < 300 * 300


def test_plain_makes_scores_for_a_part_of_the_queries_and_the_keys_within_reach(monkeypatch):
    monkeypatch.setattr(kernel_plain, "SCORES", 2 * 60 * 10)
    made, by_group = [], kernel_plain._by_group
    monkeypatch.setattr(kernel_plain, "_by_group", lambda a, b: made.append(by_group(a, b)) or made[-1])
    q, k, v, _, _, positions = draw([[60]], heads=2, groups=1, width=3, v_width=2)
    y, _ = kernel_plain.plain(q, k, v, Mask(None, positions, window=5), scale=1.0)
    y.sum().backward()
    assert max(each.numel() for each in made) <= 2 * 10 * (10 + 4)  # ten queries of two heads, keys in their windows


@pytest.mark.parametrize("name", [KernelName.plain, KernelName.sdpa])
def test_bf16_is_near_the_exact_result(name):
    q, k, v, _, documents, positions = draw([[30, 20]], dtype=torch.bfloat16)
    kernel = Kernel(scale=0.5, width=8, v_width=6)
    kernel.chosen = name
    mask = Mask(documents, positions)
    y = kernel(q, k, v, mask)
    want = formula(kernel, q.double(), k.double(), v.double(), mask)
    assert y.dtype is torch.bfloat16 and (y.double() - want).norm() <= 1e-2 * want.norm()
    grads = torch.autograd.grad(y.sum(), [q, k, v])
    for got, exact in zip(grads, torch.autograd.grad(want.sum(), [q, k, v]), strict=True):
        assert got.dtype is torch.bfloat16
        assert (got.double() - exact.double()).norm() <= 2e-2 * exact.double().norm() + 1e-3


def test_scores_too_large_for_an_exponential_do_no_harm():
    q, k, v, sinks, _, positions = draw([[8]], dtype=torch.float32)
    kernel = Kernel(scale=1e4, width=8, v_width=6, has_sinks=True)
    y = kernel(q, k, v, Mask(None, positions), sinks=sinks * 1e4)
    assert y.isfinite().all()
    assert all(each.isfinite().all() for each in torch.autograd.grad(y.sum(), [q, k, v, sinks]))


BARE = Needs(64, 64)
GROK = Needs(128, 128, softcap=True, temperature=True)
GPT_OSS = Needs(64, 64, sinks=True)
DEEPSEEK = Needs(192, 128)
NARROW = Needs(8, 8, sinks=True)


@pytest.mark.parametrize(
    "needs, device, dtype, chosen",
    [
        (BARE, CPU, torch.float32, KernelName.sdpa),
        (DEEPSEEK, CPU, torch.float64, KernelName.sdpa),
        (GROK, CPU, torch.bfloat16, KernelName.plain),
        (GPT_OSS, CPU, torch.float32, KernelName.plain),
        (BARE, CUDA, torch.bfloat16, KernelName.varlen),
        (DEEPSEEK, CUDA, torch.bfloat16, KernelName.flex),
        (GROK, CUDA, torch.bfloat16, KernelName.flex),
        (GPT_OSS, CUDA, torch.float32, KernelName.flex),
        (BARE, CUDA, torch.float32, KernelName.sdpa),
        (GROK, CUDA, torch.float64, KernelName.plain),
        (NARROW, CUDA, torch.bfloat16, None),
    ],
)
def test_the_choice_follows_needs_device_and_format(needs, device, dtype, chosen):
    assert choose(needs, device=device, dtype=dtype) is chosen
    assert chosen is None or not lacks(chosen, needs, device=device, dtype=dtype)
    assert KernelName.plain in able(needs, device=device, dtype=dtype)


def test_a_kernel_that_cannot_says_what():
    assert lacks(KernelName.sdpa, GROK, device=CPU, dtype=torch.float32) == ["softcap", "temperature"]
    assert lacks(KernelName.flex, BARE, device=CPU, dtype=torch.float32) == ["a backward on a CPU"]
    assert lacks(KernelName.flex, NARROW, device=CUDA, dtype=torch.float64) == [
        "float64",
        "heads of fewer than 16 dimensions",
    ]
    assert lacks(KernelName.varlen, DEEPSEEK, device=CUDA, dtype=torch.bfloat16) == [
        "values of another width than keys"
    ]
    assert lacks(KernelName.varlen, BARE, device=CUDA, dtype=torch.float32) == ["float32"]
