"""Rows whose tokens several ranks have: the layout, and the collectives that go with it."""

import pytest
import torch
from distributed import run
from hypothesis import given
from hypothesis import strategies as st

from parallel.comm import Lane
from parallel.context import RowContext, gather_rows, join_rows, natural, own, stretches, to_own, to_rows

B, T, W = 3, 16, 5


def place(rank, size):
    """Ranks of no group, for what does not communicate."""
    return Lane(None, rank, size)


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_rank_has_a_head_and_a_tail():
    tokens = torch.arange(8)[None]
    assert own(tokens, place(0, 2)).tolist() == [[0, 1, 6, 7]] and own(tokens, place(1, 2)).tolist() == [[2, 3, 4, 5]]
    assert [own(torch.arange(6), place(rank, 3), dim=0).tolist() for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert natural(torch.tensor([[0, 1, 6, 7, 2, 3, 4, 5]]), place(0, 2)).tolist() == tokens.tolist()


@given(size=st.integers(1, 7), chunk=st.integers(1, 4), dim=st.sampled_from([0, 1, 2]))
def test_own_tokens_of_all_ranks_in_order_are_the_row(size, chunk, dim):
    length = 2 * size * chunk
    row = torch.arange(length).view([length if d == dim else 1 for d in range(3)]).expand(
        [length if d == dim else 2 for d in range(3)]
    )  # fmt: skip
    parts = [own(row, place(rank, size), dim=dim) for rank in range(size)]
    assert torch.equal(natural(torch.cat(parts, dim=dim), place(0, size), dim=dim), row)
    for rank, part in enumerate(parts):
        head, tail = stretches(place(rank, size), length)
        assert part.select((dim + 1) % 3, 0).flatten().unique().tolist() == [*head, *tail]
    # What a token attends to is as many tokens as its place: all ranks have as many, but for the diagonal.
    work = {sum(sum(part.select((dim + 1) % 3, 0).flatten().unique().tolist()) for part in [each]) for each in parts}
    assert len(work) == 1


def lane():
    group = torch.distributed.group.WORLD
    return Lane(group, group.rank(), group.size())


def through(operation, shape):
    """What a rank's own input and a gradient of its own give."""
    own_lane = lane()
    x = drawn(*shape, seed=own_lane.rank).requires_grad_()
    y = operation(x, own_lane)
    y.backward(drawn(*y.shape, seed=10 + own_lane.rank))
    return y.detach(), x.grad


@pytest.mark.parametrize("size", [2, 4])
def test_gathered_rows_are_in_order_and_gradients_are_summed(size):
    parts = [drawn(B, T // size, W, seed=rank) for rank in range(size)]
    total = sum(drawn(B, T, W, seed=10 + rank) for rank in range(size))
    results = run(through, world_size=size, operation=gather_rows, shape=(B, T // size, W))
    for rank, (y, grad) in enumerate(results):
        assert torch.equal(y, natural(torch.cat(parts, dim=1), place(0, size)))
        torch.testing.assert_close(grad, own(total, place(rank, size)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_heads_and_tokens_change_places_and_gradients_go_back(size):
    heads = drawn(B, T, size, W, seed=5)  # whole rows of all heads
    results = run(exchanged, world_size=size, heads=heads)
    for rank, (rows, grad, back) in enumerate(results):
        assert torch.equal(rows, heads[:, :, rank])
        assert torch.equal(back, own(heads, place(rank, size)))
        assert torch.equal(grad, own(heads, place(rank, size)) * 2)


def exchanged(heads):
    own_lane = lane()
    x = own(heads, own_lane).requires_grad_()
    rows = to_rows(x, own_lane)
    back = to_own(rows, own_lane)
    (rows.square().sum() / 2 + (back * back.detach()).sum()).backward()
    return rows.detach(), x.grad, back.detach()


def joined():
    own_lane = lane()
    y = join_rows(own(drawn(B, T, W, seed=0), own_lane).requires_grad_(), own_lane)
    assert not y.requires_grad
    return y


def test_logits_are_joined_in_order():
    for y in run(joined, world_size=2):
        assert torch.equal(y, drawn(B, T, W, seed=0))


def test_positions_are_own_and_masks_of_whole_rows():
    positions, documents = torch.arange(8).expand(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]]).expand(2, 8)
    context = RowContext.cut(positions, documents, lane=place(1, 2), dtype=torch.float64, length=8)
    assert context.positions.tolist() == [[2, 3, 4, 5]] * 2 and context.documents.tolist() == [[0, 1, 1, 1]] * 2
    mask = context.mask(window=3)
    assert mask.positions.shape == (2, 8) and torch.equal(mask.pieces, documents.int()) and mask.window == 3
    assert context.mask(window=3) is mask and context.mask(window=2) is not mask
    assert RowContext.cut(positions, None, lane=place(1, 2), dtype=torch.float64, length=8).mask().is_causal
