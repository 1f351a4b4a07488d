"""What leaves a rank, of each collective."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.config_fit import Sizes
from parallel.mesh import lay_out
from planner.wire import Wire, by_axis


@pytest.fixture
def mesh():
    """Rank 5 of 2 x 4: dp_shard 2, tp 4."""
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    mesh = lay_out(Sizes(1, 2, tp=4), device=torch.device("cpu"), rank=5)
    yield mesh
    mesh.close()


def tensor(*shape):
    return torch.zeros(*shape, dtype=torch.float32)


def sums(group):
    dist.all_reduce(tensor(100), group=group)


def gathers(group):
    dist.all_gather_single(tensor(100), tensor(25), group=group)


def gathers_parts(group):
    dist.all_gather([tensor(25) for _ in range(4)], tensor(25), group=group)


def scatters(group):
    dist.reduce_scatter_single(tensor(25), tensor(100), group=group)


def exchanges(group):
    dist.all_to_all_single(tensor(100), tensor(100), group=group)


def exchanges_unevenly(group):  # rank 5 is place 1 of its group: 30 of 100 stay
    dist.all_to_all_single(tensor(90), tensor(100), [20, 30, 20, 20], [10, 30, 50, 10], group=group)


def sends(group):
    dist.send(tensor(100), group_dst=2, group=group)


def receives(group):
    dist.recv(tensor(100), group_src=2, group=group)


def waits(group):
    dist.barrier(group=group)


def sums_functionally(group):
    functional.all_reduce(tensor(100), "sum", group).wait()


def gathers_functionally(group):
    functional.all_gather_single(tensor(25), 0, group).wait()


def scatters_functionally(group):
    functional.reduce_scatter_single(tensor(100), "sum", 0, group).wait()


@pytest.mark.parametrize(
    "call, operation, numbers",
    [
        (sums, "all-reduce", 150),
        (gathers, "all-gather", 75),
        (gathers_parts, "all-gather", 75),
        (scatters, "reduce-scatter", 75),
        (exchanges, "all-to-all", 75),
        (exchanges_unevenly, "all-to-all", 70),
        (sends, "send", 100),
        (receives, None, 0),
        (waits, None, 0),
        (sums_functionally, "all-reduce", 150),
        (gathers_functionally, "all-gather", 75),
        (scatters_functionally, "reduce-scatter", 75),
    ],
)
def test_a_collective_sends_as_much_as_a_ring_would(mesh, call, operation, numbers):
    with Wire(mesh) as wire:
        call(mesh.group("tp"))
        call(mesh.group("tp"))
    found = [(line.axis, line.ranks, line.operation, line.calls, line.sent) for line in wire.lines.values()]
    assert found == ([("tp", 4, operation, 2, 2 * 4 * numbers)] if operation else [])


def test_axes_are_kept_apart_and_know_their_ranks(mesh):
    with Wire(mesh) as wire:
        sums(mesh.group("tp"))
        scatters_functionally(mesh.group("dp_shard"))
        sums(dist.group.WORLD)
    assert by_axis(wire.lines.values()) == {"tp": 600, "dp_shard": 200, "shards": 700}
    assert {line.axis: (line.first, line.last) for line in wire.lines.values()} == {
        "tp": (4, 7),
        "dp_shard": (1, 5),
        "shards": (0, 7),
    }


def test_a_collective_that_is_not_known_is_not_left_out(mesh):
    with Wire(mesh), pytest.raises(KeyError, match="c10d::reduce_"):
        dist.reduce(tensor(4), group_dst=0, group=mesh.group("tp"))
