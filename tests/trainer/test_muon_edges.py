"""Muon where ranks have no part of a matrix, own none, or unequally many: bitwise one process, on three."""

import pytest
import torch
import torch.distributed as dist
from distributed import run
from sharing import NUMBERS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from parallel import owners
from parallel.comm import Lane
from parallel.owners import Matrix
from trainer.muon import Muon, Weight

RANKS = 3
CASES = {
    "one row": [((1, 6), 0)],
    "fewer matrices than ranks": [((5, 3), 0), ((1, 9), 0)],
    "unequally many": [((4, 7), 0)] * 5,
    "experts on two of three": [((2, 6, 4), 0), ((4, 4), 0)],
    "experts cut inside": [((2, 6, 4), 1), ((7, 6, 4), 0)],
    "columns": [((4, 2), 1), ((3, 8), 1)],
}


def matrices(number, shape):
    """All of a bank, or the one; of plain matrices of two rows or more the last row is a matrix by itself."""
    name = str(number)
    if len(shape) == 3:
        return [Matrix(name, shape, e, shape[1], 0, shape[1]) for e in range(shape[0])]
    rows = shape[0]
    parts = [(0, rows - 1), (rows - 1, 1)] if rows > 1 and number % 2 else [(0, rows)]
    return [Matrix(name, shape, None, rows, *part) for part in parts]


def updated(case, dtype):
    """This rank's parts of parameters and momenta after three updates, how many matrices it owns, and rounds."""
    torch.set_num_threads(1)
    alone = not dist.is_initialized()
    mesh = None if alone else init_device_mesh("cpu", (RANKS,))
    stage = None if alone else Lane(dist.group.WORLD, dist.get_rank(), RANKS)
    drawn = torch.Generator().manual_seed(5)
    weights, cuts = [], []
    for number, (shape, dim) in enumerate(CASES[case]):
        whole = torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype)
        cuts.append(lambda x, dim=dim: x if alone else _chunk(x, dim))
        parameter = nn.Parameter(cuts[-1](whole).clone())
        view = parameter.detach()
        if mesh is not None:
            view = DTensor.from_local(
                view, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
        weights.append(Weight(parameter, view, matrices(number, shape)))
    device = torch.device("cpu")
    muon = Muon(weights, config=NUMBERS, lr=0.02, weight_decay=0.1, stage=stage, copies=1, device=device)
    for step in range(3):
        for number, (weight, cut, (shape, _)) in enumerate(zip(weights, cuts, CASES[case], strict=True)):
            gradient = torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype)
            weight.parameter.grad = None if (number, step) == (1, 1) else cut(gradient).clone()
        muon.step()
    me = 0 if alone else dist.get_rank()
    owned = sum(task.owner == me for each in muon.rounds for task in each.tasks)
    parts = [x for w in weights for x in (w.parameter.detach(), muon.state[w.parameter]["momentum_buffer"])]
    return parts, owned, len(muon.rounds)


def _chunk(x, dim):
    """As torch shards; nothing on ranks that are too many."""
    chunks = x.chunk(RANKS, dim=dim)
    place = dist.get_rank()
    return chunks[place] if place < len(chunks) else x.narrow(dim, 0, 0)


def every(dtype, limit):
    owners.LIMIT = limit
    return {case: updated(case, dtype) for case in CASES}


@pytest.mark.parametrize("dtype, limit", [(torch.float32, owners.LIMIT), (torch.float64, 20)])
def test_ranks_without_a_part_or_a_matrix_take_part_in_every_round(dtype, limit):
    results = run(every, world_size=RANKS, dtype=dtype, limit=limit)
    for case, given in CASES.items():
        want, n, _ = updated(case, dtype)
        ours, owned, rounds = zip(*(result[case] for result in results), strict=True)
        for i, x in enumerate(want):
            assert torch.equal(torch.cat([parts[i] for parts in ours], dim=given[i // 2][1]), x), case
        assert sum(owned) == n, case
        assert len({*rounds}) == 1 and (rounds[0] > 1 or limit > 20 or case != "unequally many"), case
    owned = {case: [result[case][1] for result in results] for case in CASES}
    assert 0 in owned["one row"] and 0 in owned["fewer matrices than ranks"]
    assert sorted(owned["unequally many"]) == [2, 2, 3]
