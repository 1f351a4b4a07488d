"""Whole mixers of ranks that have some tokens of each row, with all gradients, against one process in float64."""

import pytest
import torch
from distributed import run
from sharing import FAMILIES, random_value

from parallel.comm import Lane
from parallel.compiled import compiled
from parallel.config import ContextMethod, Remat
from parallel.context import RowContext, natural, own
from parallel.context_kernels import share_rows
from parallel.remat import recomputed
from zoo.block import Block
from zoo.context import Context
from zoo.decoder import positions_within

B, T = 2, 16
GATHER, ULYSSES, RING = ContextMethod
MIXERS = {
    "llama3": [0],
    "deepseek_v3": [0],  # MLA
    "gemma3": [0, 5],  # window of documents, all
    "llama4_maverick": [0, 3],  # chunks, and temperature by steps without positions
    "gpt_oss": [0, 1],  # sinks
    "qwen3_next": [0, 3],  # delta rule, and gated attention
    "grok2": [0],  # softcap and temperature by ratio
    "olmo2": [0],  # norms over all heads
}


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shared(name, layer, lane=None, method=None, told=True, compile_with=None):
    """What a block's mixer gives and its gradients; with a lane of own tokens, of parameters a part."""
    config = FAMILIES[name]()
    block = Block(config.layers[layer], model=config).double()
    for key, parameter in block.named_parameters():
        parameter.data.copy_(random_value(key, parameter.shape))
    documents = (torch.rand(B, T, generator=torch.Generator().manual_seed(7)) < 0.15).cumsum(1) if told else None
    x, grad = drawn(B, T, config.d_model, seed=1), drawn(B, T, config.d_model, seed=2)
    positions = positions_within(x[..., 0].long() if documents is None else documents, split=told)
    common = {"dtype": torch.float64, "length": config.context}
    if lane is None:
        context = Context(positions, documents, **common)
    else:
        share_rows(block, lane, method)
        context = RowContext.cut(positions, documents, lane=lane, **common)
        x, grad = own(x, lane), own(grad, lane)
    x.requires_grad_()
    torch.compiler.reset()  # as in a run, whose blocks of a kind differ in nothing
    mix = compiled(Mixed.forward, backend=compile_with) if compile_with else Mixed.forward
    y, _ = mix(block, x, context)
    y.backward(grad)
    parts = {key: p.grad for key, p in block.mixer.named_parameters()}
    return {"y": y.detach(), "x": x.grad}, parts


class Counted:
    """Bytes that this rank gets from others by collectives and sends."""

    def __init__(self, lane):
        self.bytes, n = 0, lane.size
        self.wrap("all_gather_single", lambda out, x, **_: (n - 1) * x.nbytes)
        self.wrap("reduce_scatter_single", lambda out, x, **_: (n - 1) * out.nbytes)
        self.wrap("all_to_all_single", lambda out, x, **_: (n - 1) * x.nbytes // n)
        self.wrap("batch_isend_irecv", lambda operations: operations[0].tensor.nbytes)

    def wrap(self, name, size):
        inner = vars(torch.distributed)[name]

        def counted(*args, **kwargs):
            self.bytes += size(*args, **kwargs)
            return inner(*args, **kwargs)

        setattr(torch.distributed, name, counted)

    def take(self):
        taken, self.bytes = self.bytes, 0
        return taken


def sent(cases):
    """Bytes forward and backward of a block, and its gradient."""
    group = torch.distributed.group.WORLD
    lane, found = Lane(group, group.rank(), group.size()), []
    counted = Counted(lane)
    for name, method, how in cases:
        config = FAMILIES[name]()
        block = Block(config.layers[0], model=config).double()
        for key, parameter in block.named_parameters():
            parameter.data.copy_(random_value(key, parameter.shape))
        share_rows(block, lane, method)
        context = RowContext.cut(torch.arange(T).expand(B, T), None, lane=lane, dtype=torch.float64, length=T)
        x = own(drawn(B, T, config.d_model, seed=1), lane).requires_grad_()
        run_block = Block.forward if how is Remat.none else recomputed(Block.forward, how=how)
        y, _ = run_block(block, x, context)
        forward = counted.take()
        y.square().sum().backward()
        found.append((forward, counted.take(), x.grad))
    return found


def test_a_layer_sends_what_the_docs_say():
    n, e, tokens = 2, 8, B * T // 2
    every = {
        ("llama3", GATHER): [tokens * 2 * (8 + 8)] * 2,  # G (K + U)
        ("deepseek_v3", GATHER): [tokens * (6 + 2)] * 2,  # C + R
        ("llama3", ULYSSES): [tokens * (8 * 8 + 2 * (8 + 8) + 8 * 8) // n] * 2,  # H K + G (K + U) + H U
        ("qwen3_next", RING): [tokens * (2 * 4 * 6 + 2 * 8 * 5 + 2 * 8) // n] * 2,  # 2 G K + 2 H V + 2 H
        ("llama3", RING): [tokens * 2 * (8 + 8), tokens * 2 * (8 + 8) * (1 + n)],
    }
    cases = [(*case, Remat.none) for case in every] + [("llama3", RING, how) for how in Remat]
    for found in run(sent, world_size=n, cases=cases):
        for (forward, backward, _), want in zip(found, every.values(), strict=False):
            assert [forward, backward] == [e * (n - 1) * part for part in want]
        none, block, selective = found[len(every) :]
        assert torch.equal(none[2], block[2]) and torch.equal(none[2], selective[2])
        assert none[:2] == selective[:2], "what a ring gave was not kept"
        assert block[1] == none[0] + none[1]


class Mixed(Block):
    """A block's mixer alone."""

    def forward(self, x, context):
        return self._mix(x, context), None


def all_shared(cases):
    group = torch.distributed.group.WORLD
    lane = Lane(group, group.rank(), group.size())
    return [shared(lane=lane, **case) for case in cases]


def compare(cases, size):
    results, far = run(all_shared, world_size=size, timeout=300, cases=cases), 0.0
    for i, case in enumerate(cases):
        alone = {key: value for key, value in case.items() if key not in ("method", "compile_with")}
        tokens, whole = shared(**alone)
        got = {key: natural(torch.cat([r[i][0][key] for r in results], dim=1), Lane(None, 0, size)) for key in tokens}
        got |= {key: sum(r[i][1][key] for r in results) for key in whole}
        want = tokens | whole
        largest = max(x.abs().max() for x in want.values())
        for key, value in want.items():
            gap = (got[key] - value).abs().max()
            assert gap <= 1e-11 * value.abs().max() + 1e-12 * largest, (case, key, gap)
            far = max(far, (gap / (value.abs().max() + 1e-3 * largest)).item())
    print(f"{size}: {far:.1e}")


def cases_of(method, names):
    return [
        {"name": name, "layer": layer, "method": method, "told": told}
        for name in names
        for layer in MIXERS[name]
        for told in (True, False)
    ]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [GATHER, ULYSSES])
def test_mixers_of_own_tokens_are_those_of_whole_rows(method, size):
    compare(cases_of(method, MIXERS), size)


@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_of_mixers_is_as_whole_rows(size):
    compare(cases_of(RING, ["llama3", "deepseek_v3", "gemma3", "llama4_maverick", "qwen3_next"]), size)


def compiled_cases(names):
    return [
        {"name": name, "layer": 0, "method": method, "compile_with": "aot_eager"}
        for method, of in names.items()
        for name in of
    ]


@pytest.mark.parametrize(
    "names",
    [
        {GATHER: ["gpt_oss"], RING: ["gemma3"]},
        pytest.param({GATHER: ["deepseek_v3"], ULYSSES: ["gpt_oss", "qwen3_next"]}, marks=pytest.mark.slow),
    ],
)
def test_compiled_mixers_of_own_tokens_are_as_whole_rows(names):
    compare(compiled_cases(names), 2)
