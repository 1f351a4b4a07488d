"""Attention of ranks that have some tokens of each row, three ways, against one process in float64."""

import pytest
import torch
from distributed import run

from parallel.comm import Lane
from parallel.config import ContextMethod, KernelChoice
from parallel.context import natural, own
from parallel.context_kernels import ByHeads, Gathering, own_heads
from parallel.kernels import choose_kernels, told
from parallel.mesh import MeshError
from parallel.ring import Ring, _Own
from parallel.tensor import become
from zoo.config_mixer import TemperatureConfig, TemperatureKind
from zoo.kernel import Kernel
from zoo.kernel_choice import KernelName
from zoo.mask import Mask

B, T = 2, 16
KINDS = {ContextMethod.gather: Gathering, ContextMethod.ulysses: ByHeads, ContextMethod.ring: Ring}
RATIO = TemperatureConfig(kind=TemperatureKind.ratio, floor=3, scale=1.0)
HEADS = {"H": 8, "G": 4, "K": 6, "U": 6}
MASKS = {
    "causal": {},
    "documents": {"documents": True},
    "window": {"window": 5},
    "chunk": {"chunk": 3},
    "window of documents": {"documents": True, "window": 3},
    "chunk of documents": {"documents": True, "chunk": 3},
}
EVERYWHERE = {
    **{name: HEADS | {"mask": mask} for name, mask in MASKS.items()},
    "one key head": HEADS | {"G": 1, "mask": MASKS["documents"]},
    "two key heads": HEADS | {"G": 2, "mask": {}},
    "narrow values": HEADS | {"G": 8, "U": 4, "mask": MASKS["documents"]},
}
SLOTS = {
    "sinks": HEADS | {"mask": {"documents": True, "window": 5}, "sinks": True},
    "sinks, causal": HEADS | {"mask": {}, "sinks": True},
    "softcap": HEADS | {"mask": MASKS["documents"], "softcap": 0.7},
    "temperature": HEADS | {"mask": MASKS["documents"], "softcap": 0.7, "temperature": RATIO},
}
PLAIN = {f"{name}, plain": case | {"chosen": KernelName.plain} for name, case in EVERYWHERE.items()}


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(documents=False, window=None, chunk=None):
    """Rows of uneven documents: one ends within a head, one spans all ranks."""
    ids = torch.tensor([[0] * 3 + [1] * 6 + [2] * 7, [0] * 15 + [1]])
    positions = torch.tensor([[*range(3), *range(6), *range(7)], [*range(15), 0]])
    rows = torch.arange(T).expand(B, T)
    return Mask(ids if documents else None, positions if documents else rows, window, chunk)


def attended(case, lane=None, method=None, dtype=torch.float64):
    """The result, gradients and the largest logits; of own tokens where there is a lane, of sinks a part of them."""
    H, G, K, U = (case[letter] for letter in "HGKU")
    slots = {key: case[key] for key in ("softcap", "temperature") if key in case}
    kernel = Kernel(scale=0.4, width=K, v_width=U, has_sinks="sinks" in case, **slots)
    kernel.chosen = case.get("chosen", kernel.chosen)
    whole = {"q": drawn(B, T, H, K, seed=1), "k": drawn(B, T, G, K, seed=2), "v": drawn(B, T, G, U, seed=3)}
    grad, sinks = drawn(B, T, H, U, seed=4), drawn(H, seed=5).requires_grad_() if "sinks" in case else None
    if lane is not None:
        become(kernel, KINDS[method], lane=lane)
        whole, grad = {name: own(x, lane) for name, x in whole.items()}, own(grad, lane)
    heads = own_heads(kernel, n_heads=H, tp=None)
    kernel.measure(n_heads=len(heads), dtype=torch.float64, device=torch.device("cpu"))
    inputs = {name: x.to(dtype, copy=True).requires_grad_() for name, x in whole.items()}
    y = kernel(**inputs, mask=mask_of(**case["mask"]), sinks=sinks)
    y.backward(grad.to(dtype))
    assert all(x.grad.dtype is y.dtype is dtype for x in inputs.values())
    logits = torch.full((H,), -torch.inf, dtype=torch.float64)
    logits[heads.start : heads.stop] = kernel.top
    found = {"y": y.detach(), "logits": logits} | {name: x.grad for name, x in inputs.items()}
    return found | ({} if sinks is None else {"sinks": sinks.grad})


def everywhere(method, cases, dtype):
    group = torch.distributed.group.WORLD
    lane = Lane(group, group.rank(), group.size())
    return {name: attended(case, lane, method, dtype) for name, case in cases.items()}


def far(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def apart(method, cases, size, dtype=torch.float64):
    """By case and tensor: how far what ranks give together is from one process in float64, and all of it."""
    results, found = run(everywhere, world_size=size, method=method, cases=cases, dtype=dtype), {}
    for name, case in cases.items():
        for key, want in attended(case).items():
            parts = [result[name][key].double() for result in results]
            if key == "logits":
                got = torch.stack(parts).amax(0)
            else:
                got = sum(parts) if key == "sinks" else natural(torch.cat(parts, dim=1), Lane(None, 0, size))
            found[name, key] = far(got, want)
    print(f"{method} of {size} in {dtype}: {max(found.values()):.1e}")
    return found


CASES = {
    ContextMethod.gather: EVERYWHERE | SLOTS | PLAIN,
    ContextMethod.ulysses: EVERYWHERE | SLOTS | PLAIN,
    ContextMethod.ring: EVERYWHERE,
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", ContextMethod)
def test_own_tokens_attend_as_in_whole_rows(method, size):
    found = apart(method, CASES[method], size)
    assert {key: gap for key, gap in found.items() if gap > 1e-12} == {}


@pytest.mark.parametrize("method", ContextMethod)
def test_own_tokens_in_bf16_are_as_near_as_whole_rows_in_bf16(method):
    cases = {name: EVERYWHERE[name] for name in ("causal", "documents", "two key heads", "narrow values")}
    found = apart(method, cases, 2, dtype=torch.bfloat16)
    times = 4 if method is ContextMethod.gather else 2  # which adds parts of gradients of keys and values up in bf16
    for name, case in cases.items():
        alone, want = attended(case, dtype=torch.bfloat16), attended(case)
        for key, value in alone.items():
            assert found[name, key] <= times * far(value.double(), want[key]) + 1e-3, (name, key)


def blocks(mask, rank, size):
    """Own half, rank and half of keys, whether causal and whether masked, of all that a rank attends to."""
    ring = _Own(torch.zeros(B, T // size, 1, 1), mask.pieces, mask.table(2 * size), mask.window, rank, size)
    return [
        (half, other, theirs, causal, hidden is not None)
        for other in range(size)
        for half, theirs, causal, hidden in ring.blocks(other)
    ]


def test_a_ring_gives_all_ranks_as_much_to_do():
    assert [len(blocks(mask_of(), rank, 4)) for rank in range(4)] == [9] * 4  # 2n + 1
    # Chunks of three ranks are 0 5, 1 4 and 2 3, as in the docstring.
    rows = Mask(None, torch.arange(12).expand(B, 12))
    ring = _Own(torch.zeros(B, 4, 1, 1), rows.pieces, rows.table(6), None, 1, 3)
    assert [each[:3] for each in ring.blocks(0)] == [(0, 0, False), (1, 0, False)]
    assert [each[:3] for each in ring.blocks(1)] == [(0, 0, True), (1, 0, False), (1, 1, True)]
    assert [each[:3] for each in ring.blocks(2)] == [(1, 0, False), (1, 1, False)]


def test_a_ring_leaves_out_what_nobody_sees_and_masks_only_where_it_must():
    columns = torch.arange(T).expand(B, T)
    pairs = Mask(columns // 2, columns % 2)  # documents as long as the chunks of four ranks
    assert blocks(pairs, 1, 4) == [(0, 1, 0, True, False), (1, 1, 1, True, False)]
    near = Mask(None, columns, window=2)  # of its own chunk and one token of the chunk before
    assert blocks(near, 1, 4) == [
        (0, 0, 0, False, True), (0, 1, 0, True, False), (1, 1, 1, True, False), (1, 2, 1, False, True)
    ]  # fmt: skip
    uneven = [masked for *_, masked in blocks(mask_of(documents=True), 0, 4)]  # the second row is nearly one document
    assert len(uneven) == 9 and any(uneven) and not all(uneven)


def test_a_ring_has_kernels_of_its_own():
    holder = torch.nn.ModuleDict({"kernel": Kernel(scale=0.4, width=4, v_width=4)})
    become(holder["kernel"], Ring, lane=Lane(None, 0, 2))
    cpu = {"device": torch.device("cpu"), "dtype": torch.float64}
    choose_kernels(holder, KernelChoice.auto, **cpu)
    assert told(holder) == ["attention: ring"]
    with pytest.raises(MeshError, match=r"^parallel\.kernel=sdpa: must be auto where parallel\.context=ring$"):
        choose_kernels(holder, KernelChoice.sdpa, **cpu)
    with pytest.raises(MeshError, match=r"^parallel\.context=ring: has no kernel for fp64 on a GPU: must be gather"):
        choose_kernels(holder, KernelChoice.auto, device=torch.device("cuda"), dtype=torch.float64)


def test_a_ring_refuses_what_it_cannot_do():
    kernel = Kernel(scale=0.4, width=4, v_width=4, softcap=1.0)
    become(kernel, Ring, lane=Lane(None, 0, 2))
    x = torch.zeros(B, T // 2, 2, 4)
    with pytest.raises(AssertionError, match="softcap"):
        kernel(x, x, x, mask_of())
