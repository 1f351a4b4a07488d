"""Who brings together which matrix, without processes: every number once, work spread evenly, bytes as documented."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from parallel import owners
from parallel.owners import Matrix, Piece, boxes, tasks


def plain(name, *shape):
    return Matrix(name, shape, None, period=shape[0], first=0, width=shape[0])


def test_rows_cut_by_tp_and_then_by_fsdp_lie_as_the_example_says():
    placements = [Replicate(), _StridedShard(0, split_factor=2), Shard(0)]
    found = boxes((5, 4), axes=(1, 2, 2), placements=placements)
    assert [box[0] for box in found] == [(0, 2), (3, 4), (2, 3), (4, 5)]
    assert {box[1] for box in found} == {(0, 4)}


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 13), st.integers(1, 9)),
    axes=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    dims=st.tuples(st.integers(0, 1), st.sampled_from([0, 1, None])),
)
def test_boxes_lie_where_torch_puts_them(shape, axes, dims):
    fsdp, plan = dims
    sharded = _StridedShard(fsdp, split_factor=axes[2]) if fsdp == plan else Shard(fsdp)
    placements = [Replicate(), sharded, Replicate() if plan is None else Shard(plan)]
    for rank, box in enumerate(boxes(shape, axes=axes, placements=placements)):
        coordinate = [rank // (axes[1] * axes[2]), rank // axes[2] % axes[1], rank % axes[2]]
        sizes, corner = _compute_local_shape_and_global_offset(shape, axes, coordinate, placements)
        assert tuple(stop - start for start, stop in box) == sizes
        if all(sizes):
            assert tuple(start for start, _ in box) == corner


@settings(deadline=None)
@given(
    heads=st.integers(1, 6), parts=st.lists(st.integers(1, 4), min_size=1, max_size=3), columns=st.integers(1, 7),
    axes=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3)), dim=st.integers(0, 1),
)  # fmt: skip
def test_pieces_cover_every_number_of_every_part_once_in_each_copy(heads, parts, columns, axes, dim):
    shape = (heads * sum(parts), columns)
    sharded = _StridedShard(0, split_factor=axes[2]) if dim == 0 else Shard(0)
    held = boxes(shape, axes=axes, placements=[Replicate(), sharded, Shard(dim)])
    ranks = math.prod(axes)
    firsts = [sum(parts[:i]) for i in range(len(parts))]
    matrices = [Matrix("w", shape, None, sum(parts), *of) for of in zip(firsts, parts, strict=True)]
    (found,) = tasks([(matrix, held) for matrix in matrices], ranks=ranks, copies=axes[0])
    for task in found:
        n, m = task.matrix.size
        assert (n, m) == (heads * task.matrix.width, columns)
        for pieces, copies in ((task.senders, 1), (task.holders, axes[0])):
            seen = [(r, c) for p in pieces.values() for r in range(p.top, p.bottom) for c in range(p.left, p.right)]
            assert sorted(seen) == sorted((r, c) for r in range(n) for c in range(m) for _ in range(copies))
    for rank, box in enumerate(held):
        mine = [row for matrix in matrices if matrix.piece(box) for row in matrix.rows(box) or range(*box[0])]
        assert len(mine) == (box[0][1] - box[0][0]) * (box[1][0] < box[1][1]), rank


def test_rows_of_a_part_are_those_of_its_matrix_in_order():
    keys = Matrix("w", (6, 3), None, period=3, first=0, width=2)  # k k v k k v
    values = Matrix("w", (6, 3), None, period=3, first=2, width=1)
    box = ((1, 5), (0, 3))  # k v k k
    assert keys.piece(box) == Piece(1, 4, 0, 3) and keys.rows(box) == [0, 2, 3]
    assert values.piece(box) == Piece(0, 1, 0, 3) and values.rows(box) == [1]
    assert values.piece(((3, 5), (0, 3))) is None


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60), ranks=st.integers(1, 9))
def test_no_owner_has_more_than_an_even_share_and_the_dearest_matrix(costs, ranks):
    held = [{r: Piece(r, r + 1, 0, 1) for r in range(ranks)} for _ in costs]
    chosen = owners.owners(costs, held, ranks=ranks)
    load = [sum(c for c, owner in zip(costs, chosen, strict=True) if owner == r) for r in range(ranks)]
    assert max(load) <= sum(costs) / ranks + max(costs)


def test_layers_of_a_model_are_shared_to_within_a_tenth():
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    matrices = [plain(f"{layer}.{i}", *shape) for layer in range(32) for i, shape in enumerate(shapes)]
    given_ = [(m, boxes(m.shape, axes=(8,), placements=[Shard(0)])) for m in matrices]
    rounds = tasks(given_, ranks=8)
    loads = [[sum(t.matrix.cost for t in some if t.owner == r) for r in range(8)] for some in rounds]
    assert sum(len(some) for some in rounds) == len(matrices)
    assert sum(max(load) for load in loads) < 1.1 * sum(sum(load) for load in loads) / 8


def test_experts_that_a_rank_has_whole_stay_there():
    shape = (8, 6, 4)
    held = boxes(shape, axes=(1, 1, 4), placements=[Replicate(), Replicate(), Shard(0)])
    bank = [(Matrix("w", shape, e, 6, 0, 6), held) for e in range(8)]
    (found,) = tasks(bank, ranks=4)
    assert [task.owner for task in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(set(task.senders) == set(task.holders) == {task.owner} for task in found)


@pytest.mark.parametrize("copies", [1, 2])
def test_experts_stay_beside_dearer_matrices_that_are_cut(copies):
    ranks, shape = 2 * copies, (8, 8, 20)
    bank = boxes(shape, axes=(copies, 1, 2), placements=[Replicate(), Replicate(), Shard(0)])
    cut = boxes((64, 20), axes=(copies, 2), placements=[Replicate(), Shard(0)])
    given_ = [(plain(f"cut {i}", 64, 20), cut) for i in range(3)]
    given_ += [(Matrix("bank", shape, e, 8, 0, 8), bank) for e in range(8)]
    (found,) = tasks(given_, ranks=ranks, copies=copies)
    assert all(task.owner in task.holders for task in found if task.matrix.name == "bank")
    assert all(len(task.senders) == 1 for task in found if task.matrix.name == "bank")
    assert len({task.owner for task in found if task.matrix.name != "bank"}) == min(3, ranks)


def moved(task):
    """Numbers that travel to the owner and back."""
    out = sum(piece.numel for rank, piece in task.senders.items() if rank != task.owner)
    back = sum(piece.numel for rank, piece in task.holders.items() if rank != task.owner)
    return out, back


@pytest.mark.parametrize("copies, shard", [(1, 2), (1, 4), (2, 4), (3, 2)])
def test_of_a_matrix_as_many_numbers_travel_as_documented(copies, shard):
    matrix = plain("w", 8, 5)
    held = boxes((8, 5), axes=(copies, shard), placements=[Replicate(), Shard(0)])
    ((task,),) = tasks([(matrix, held)], ranks=copies * shard, copies=copies)
    once = 40 * (shard - 1) // shard
    assert moved(task) == (once, once + 40 * (copies - 1))
    block = range(task.owner // shard * shard, (task.owner // shard + 1) * shard)
    assert set(task.senders) == set(block)  # gradients come from the owner's own copy


def test_what_every_rank_has_goes_to_an_owner_that_has_it_too():
    held = boxes((8, 5), axes=(1, 1, 4), placements=[Replicate()] * 3)
    ((task,),) = tasks([(plain("w", 8, 5), held)], ranks=4)
    assert moved(task) == (0, 3 * 40)


def test_rounds_hold_no_more_than_their_limit(monkeypatch):
    monkeypatch.setattr(owners, "LIMIT", 50)
    matrices = [plain(str(i), 8, 5) for i in range(7)] + [plain("large", 40, 40)]
    given_ = [(m, boxes(m.shape, axes=(2,), placements=[Shard(0)])) for m in matrices]
    rounds = tasks(given_, ranks=2)
    assert sorted(t.matrix.name for some in rounds for t in some) == sorted(m.name for m in matrices)
    assert rounds[0][0].matrix.name == "large"
    for some in rounds:
        for owner in range(2):
            mine = [math.prod(t.matrix.size) for t in some if t.owner == owner]
            assert len(mine) <= 1 or sum(mine) <= 50
