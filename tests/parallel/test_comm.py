"""Collectives and their gradients, against the same arithmetic in one process."""

import pytest
import torch
from distributed import run

from parallel.comm import Lane, add, gather, join, mine, scatter

B, T, D = 3, 8, 5


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lane():
    group = torch.distributed.group.WORLD
    return Lane(group, group.rank(), group.size())


def through(operation, dtype):
    """What a rank's own input and a gradient of its own give."""
    own = lane()
    shape = (B, T // own.size, D) if operation is gather else (B, T, D)
    x = drawn(*shape, seed=own.rank).to(dtype).requires_grad_()
    y = operation(x, own)
    y.backward(drawn(*y.shape, seed=10 + own.rank).to(dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("size", [2, 4])
def test_gathered_rows_are_every_ranks_tokens_and_gradients_are_summed(size):
    parts = [drawn(B, T // size, D, seed=rank) for rank in range(size)]
    total = sum(drawn(B, T, D, seed=10 + rank) for rank in range(size))
    for rank, (y, grad) in enumerate(run(through, world_size=size, operation=gather, dtype=torch.float64)):
        assert torch.equal(y, torch.cat(parts, dim=1))
        torch.testing.assert_close(grad, total.chunk(size, dim=1)[rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_scattered_rows_are_summed_tokens_and_gradients_are_gathered(size):
    total = sum(drawn(B, T, D, seed=rank) for rank in range(size))
    back = torch.cat([drawn(B, T // size, D, seed=10 + rank) for rank in range(size)], dim=1)
    for rank, (y, grad) in enumerate(run(through, world_size=size, operation=scatter, dtype=torch.float64)):
        torch.testing.assert_close(y, total.chunk(size, dim=1)[rank], rtol=1e-12, atol=1e-12)
        assert torch.equal(grad, back)


def test_sums_are_summed_both_ways():
    for y, grad in run(through, world_size=2, operation=add, dtype=torch.float64):
        assert torch.equal(y, drawn(B, T, D, seed=0) + drawn(B, T, D, seed=1))
        assert torch.equal(grad, drawn(B, T, D, seed=10) + drawn(B, T, D, seed=11))


def test_bf16_is_summed_in_bf16():
    want = (drawn(B, T, D, seed=0).bfloat16() + drawn(B, T, D, seed=1).bfloat16()).chunk(2, dim=1)
    for rank, (y, _) in enumerate(run(through, world_size=2, operation=scatter, dtype=torch.bfloat16)):
        assert torch.equal(y, want[rank])


def pieces(width):
    own = lane()
    x, share = drawn(B, T, width, seed=0), -(-width // own.size)
    columns = x[..., own.rank * share : (own.rank + 1) * share]
    return join(columns, own, width=width), mine(x, own)


@pytest.mark.parametrize("width", [4, 7, 9, 11])
def test_uneven_columns_are_joined_and_own_tokens_are_a_slice(width):
    x = drawn(B, T, width, seed=0)
    for rank, (joined, own) in enumerate(run(pieces, world_size=4, width=width)):
        assert torch.equal(joined, x)
        assert torch.equal(own, x[:, 2 * rank : 2 * rank + 2])
