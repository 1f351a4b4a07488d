"""Calls of DeepEP's buffer, by a stand-in that has its signatures and sends over gloo what it would send."""

import pytest
import torch
import torch.distributed as dist
from distributed import run

from parallel.comm import Lane
from parallel.deepep import DeepDispatcher, open_buffer
from parallel.mesh import MeshError
from zoo.dispatch import Dispatcher

D, E, S = 6, 8, 3


class Event:
    waits = 0

    def current_stream_wait(self):
        Event.waits += 1


class Buffer:
    """Methods, their arguments, and dtypes and shapes of what comes back: deep_ep/buffers/legacy.py at 189df346."""

    def __init__(self, size, dtype):
        self.size, self.dtype = size, dtype

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        assert topk_idx.dtype is torch.int64
        homes = topk_idx // (num_experts // self.size)
        goes = torch.stack([(homes == rank).any(dim=1) for rank in range(self.size)], dim=1)
        per_expert = topk_idx.flatten().bincount(minlength=num_experts).int()
        return goes.sum(0).int(), None, per_expert, goes, Event()

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
        config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False,
    ):  # fmt: skip
        assert x.dtype is self.dtype and x.is_contiguous()
        everything = [None] * self.size
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            dist.all_gather_object(everything, x)
            return torch.stack([everything[rank][token] for rank, token in handle[0]]), None, None, None, None, Event()
        assert topk_weights.dtype is torch.float32 and topk_idx.shape == topk_weights.shape
        assert num_tokens_per_rank.shape == (self.size,) and is_token_in_rank.shape == (len(x), self.size)
        dist.all_gather_object(everything, (x, topk_idx, topk_weights, is_token_in_rank))
        me, here = dist.get_rank(), len(num_tokens_per_expert) // self.size
        sources = [(r, t) for r, part in enumerate(everything) for t in part[3][:, me].nonzero().flatten().tolist()]
        choices = torch.stack([everything[rank][1][token] for rank, token in sources]) - me * here
        elsewhere = (choices < 0) | (choices >= here)
        choices = choices.masked_fill(elsewhere, -1)
        weights = torch.stack([everything[rank][2][token] for rank, token in sources]).masked_fill(elsewhere, 0.0)
        counts = [(choices == expert).sum().item() for expert in range(here)]
        rows = torch.stack([everything[rank][0][token] for rank, token in sources])
        return rows, choices, weights, counts, (sources, len(x)), Event()

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False,
    ):  # fmt: skip
        assert x.dtype is self.dtype and x.is_contiguous() and len(x) == len(handle[0])
        assert topk_weights is None or topk_weights.dtype is torch.float32 and topk_weights.shape == (len(x), S)
        everything = [None] * self.size
        dist.all_gather_object(everything, (handle[0], x, topk_weights))
        rows = torch.zeros(handle[1], x.shape[1], dtype=x.dtype)
        weights = None if topk_weights is None else torch.zeros(handle[1], S)
        for sources, theirs, scales in everything:
            for place, (rank, token) in enumerate(sources):
                if rank == dist.get_rank():
                    rows[token] += theirs[place]
                    if scales is not None:
                        weights[token] += scales[place]
        return rows, weights, Event()


def inputs(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:S] for _ in range(5)])
    x, weights = torch.randn(5, D, generator=generator), torch.randn(5, S, generator=generator)
    return x.to(dtype), chosen, weights


def through(dispatcher, x, chosen, weights, early, matrices):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    sent = dispatcher.dispatch(x, chosen, n_experts=E, weights=weights, early=early)
    sent = dispatcher.arrived(sent)
    parts = sent.rows.split(sent.counts.tolist())
    rows = torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
    y = dispatcher.combine(rows, sent)
    (y * x.detach().cos()).sum().backward()
    return y.detach(), x.grad, weights.grad, sent.load


def matrices(dtype):
    return torch.randn(E, D, D, generator=torch.Generator().manual_seed(9)).to(dtype)


def case(early, dtype):
    rank, size = dist.get_rank(), dist.get_world_size()
    found = through(DeepDispatcher(Buffer(size, dtype)), *inputs(rank, dtype), early, matrices(dtype).chunk(size)[rank])
    assert Event.waits == 1
    return found


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("dtype, gap", [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])  # weights travel in fp32
def test_tokens_come_back_from_experts_of_all_ranks_with_gradients(early, dtype, gap):
    results = run(case, world_size=2, early=early, dtype=dtype)
    parts = [inputs(rank, torch.float64) for rank in range(2)]
    x, chosen, weights = (torch.cat(each) for each in zip(*parts, strict=True))
    want = through(Dispatcher(), x, chosen, weights.double(), early, matrices(torch.float64))
    for got, value in zip(zip(*(found[:3] for found in results), strict=True), want[:3], strict=True):
        far = (torch.cat(got).double() - value).abs().max() / value.abs().max()
        assert far < gap
    assert torch.equal(results[0][3] + results[1][3], want[3])


def test_its_absence_is_one_line():
    with pytest.raises(MeshError, match="parallel.dispatch=deepep: the package deep_ep is not installed"):
        open_buffer(Lane(None, 0, 2), d_model=8, dtype=torch.bfloat16)


def test_other_numbers_than_bf16_are_refused():
    with pytest.raises(MeshError, match="parallel.dispatch=deepep: sends bf16, precision.compute is float32$"):
        open_buffer(Lane(None, 0, 2), d_model=8, dtype=torch.float32)
