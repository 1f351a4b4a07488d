"""The largest attention logit of each head, by every kernel, against products written out in float64."""

import inspect

import pytest
import torch

from zoo import kernel_flex, kernel_max, kernel_plain
from zoo.config_mixer import TemperatureConfig, TemperatureKind
from zoo.kernel import Kernel
from zoo.kernel_choice import KernelName
from zoo.mask import Mask
from zoo.section import section

CPU = torch.device("cpu")
RATIO = TemperatureConfig(kind=TemperatureKind.ratio, floor=3)
LENGTHS = [[3, 10, 6], [12, 7]]
BOUNDS = {
    "causal": (False, {}),
    "documents": (True, {}),
    "window": (False, {"window": 5}),
    "chunk": (False, {"chunk": 4}),
    "window of documents": (True, {"window": 4}),
    "chunk of documents": (True, {"chunk": 4}),
}
SLOTS = {
    "bare": {},
    "sinks": {"has_sinks": True},
    "softcap": {"softcap": 0.4},
    "all": {"softcap": 0.4, "temperature": RATIO, "has_sinks": True},
}
EVERY = [KernelName.plain, KernelName.sdpa, KernelName.flex]


def sees(bounds, b, query, key):
    """Whether a query sees a key, from the words of ``Mask`` alone."""
    documents, more = BOUNDS[bounds]
    if key > query:
        return False
    row = [i for i, n in enumerate(LENGTHS[b]) for _ in range(n)]
    places = [t for n in LENGTHS[b] for t in range(n)]
    if documents and row[key] != row[query]:
        return False
    if "window" in more and query - key >= more["window"]:
        return False
    places = places if documents else list(range(len(row)))
    return "chunk" not in more or places[query] // more["chunk"] == places[key] // more["chunk"]


def exact(q, k, scale, bounds, queries=range(19)):
    """Head by head, query by query."""
    B, _, H, _ = q.shape
    q, k = q.detach().double(), k.detach().double()
    found = torch.full((H,), -torch.inf, dtype=torch.float64)
    for b in range(B):
        for query in queries:
            for key in range(19):
                if sees(bounds, b, query, key):
                    keys = k[b, key].repeat_interleave(H // k.shape[2], dim=0)
                    found = torch.maximum(found, scale * (q[b, query] * keys).sum(-1))
    return found


def draw(heads=(4, 2), widths=(8, 6), dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(heads) * widths[1])
    shapes = [(2, 19, heads[0], widths[0]), (2, 19, heads[1], widths[0]), (2, 19, heads[1], widths[1])]
    # Not centred, so that what is hidden or another head's would often be larger.
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).add(0.2).to(dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def masked(bounds):
    documents, more = BOUNDS[bounds]
    rows = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in LENGTHS])
    places = torch.tensor([[t for n in row for t in range(n)] for row in LENGTHS])
    return Mask(rows if documents else None, places if documents else torch.arange(19).expand(2, 19), **more)


def kernel_of(name, slots, widths=(8, 6), heads=4):
    kernel = Kernel(scale=0.6, width=widths[0], v_width=widths[1], **SLOTS[slots])
    kernel.chosen = name
    kernel.measure(n_heads=heads, dtype=torch.float64, device=CPU)
    return kernel


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_every_kernel_knows_the_largest_logit_of_each_head(monkeypatch, bounds, slots):
    monkeypatch.setitem(kernel_max.NUMBERS, "cpu", 2 * 4 * 19 * 3)  # three queries at a time
    q, k, v = draw()
    want, sinks = exact(q, k, 0.6, bounds), torch.full((4,), 9.0, dtype=torch.float64)
    for name in EVERY:
        if name is KernelName.sdpa and slots != "bare":
            continue
        kernel = kernel_of(name, slots)
        if name is KernelName.flex:  # which has no backward here, and is asked last
            q, k, v = q.detach(), k.detach(), v.detach()
        given = {"sinks": sinks} if kernel.needs.sinks else {}
        y = kernel(q, k, v, masked(bounds), **given)
        torch.testing.assert_close(kernel.top, want, rtol=1e-12, atol=0, msg=f"{name}")
        silent = kernel_of(name, slots)
        silent.top = None
        assert torch.equal(silent(q, k, v, masked(bounds), **given), y), name


def test_flex_asks_torch_for_the_largest_scores(monkeypatch):
    """Its kernel computes them on CUDA alone; what is asked of it and read from it is tried with a stand-in."""
    from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

    signature = inspect.signature(flex_attention)
    q, k, v = (x.detach() for x in draw())
    mask = masked("window of documents")

    def attend(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["return_aux"] == AuxRequest(lse=False, max_scores=True)
        key = given["key"].repeat_interleave(2, dim=1)
        scores = given["scale"] * (given["query"] @ key.mT).masked_fill(~mask.dense, -torch.inf)
        y = scores.softmax(-1) @ given["value"].repeat_interleave(2, dim=1)
        return y, AuxOutput(max_scores=scores.amax(-1))

    monkeypatch.setattr(kernel_flex, "attention", lambda compiled: attend)
    y, top = kernel_flex.flex(q, k, v, mask, scale=0.6, tells=True)
    torch.testing.assert_close(top, exact(q, k, 0.6, "window of documents"), rtol=1e-12, atol=0)
    torch.testing.assert_close(y, kernel_plain.plain(q, k, v, mask, scale=0.6)[0])


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("name", [KernelName.plain, KernelName.sdpa])
def test_heads_that_share_a_key_head_have_their_own(name, heads):
    q, k, v = draw(heads, widths=(8, 5))
    kernel = kernel_of(name, "bare", widths=(8, 5), heads=heads[0])
    kernel(q, k, v, masked("documents"))
    torch.testing.assert_close(kernel.top, exact(q, k, 0.6, "documents"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_queries_of_a_section_are_measured_with_the_keys_that_they_see(bounds):
    q, k, v = draw()
    part = section(masked(bounds), range(6, 13))
    for name in (KernelName.plain, KernelName.sdpa):
        kernel = kernel_of(name, "bare")
        here = part.keys.start, part.keys.stop
        kernel(q[:, 6:13], k[:, here[0] : here[1]], v[:, here[0] : here[1]], part)
        torch.testing.assert_close(kernel.top, exact(q, k, 0.6, bounds, range(6, 13)), rtol=1e-12, atol=0)


def test_the_largest_of_several_forwards_is_kept_and_evaluation_adds_nothing():
    q, k, v = draw()
    kernel = kernel_of(KernelName.sdpa, "bare")
    kernel(q, k, v, masked("causal"))
    kernel(0.5 * q, k, v, masked("causal"))
    first = kernel.top.clone()
    torch.testing.assert_close(first, exact(q, k, 0.6, "causal"), rtol=1e-12, atol=0)
    kernel.eval()
    kernel(9 * q, k, v, masked("causal"))
    assert torch.equal(kernel.top, first)
    kernel.train()
    kernel(9 * q, k, v, masked("causal"))
    assert (kernel.top > first).all()
    assert not kernel.state_dict()


def test_gradients_are_the_same_with_and_without():
    for name in (KernelName.plain, KernelName.sdpa):
        found = []
        for silent in (False, True):
            q, k, v = draw()
            kernel = kernel_of(name, "bare")
            kernel.top = None if silent else kernel.top
            y = kernel(q, k, v, masked("documents"))
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [q, k, v])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", [KernelName.plain, KernelName.sdpa])
def test_bf16_is_measured_in_fp32(name):
    q, k, v = draw(dtype=torch.bfloat16)
    kernel = kernel_of(name, "bare")
    kernel(q, k, v, masked("documents"))
    torch.testing.assert_close(kernel.top, exact(q, k, 0.6, "documents"), rtol=1e-6, atol=0)


def test_only_a_part_of_the_logits_is_there_at_one_time(monkeypatch):
    monkeypatch.setitem(kernel_max.NUMBERS, "cpu", 2 * 60 * 10)
    made, products = [], kernel_max._products
    monkeypatch.setattr(kernel_max, "_products", lambda a, b: made.append(products(a, b)) or made[-1])
    q, k = torch.randn(1, 60, 2, 3), torch.randn(1, 60, 1, 3)
    kernel_max.measured(q, k, Mask(None, torch.arange(60)[None], window=5), scale=1.0)
    assert len(made) == 6 and max(each.numel() for each in made) <= 2 * 10 * (10 + 4)


def test_a_gpu_multiplies_narrow_numbers_into_wide_ones():
    """The operator's own signature, without numbers: it computes on CUDA alone."""
    q, k = (torch.empty(6, n, 16, dtype=torch.bfloat16, device="meta") for n in (5, 7))
    assert torch.bmm(q, k.mT, out_dtype=torch.float32).dtype is torch.float32


def test_a_dry_run_knows_the_shape():
    q, k = (torch.empty(2, 9, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    found = kernel_max.measured(q, k, Mask(None, torch.empty(2, 9, device="meta")), scale=1.0)
    assert found.shape == (4,) and found.dtype is torch.float32
