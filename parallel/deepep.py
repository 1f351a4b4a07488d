"""Tokens travel by the kernels of DeepEP, which send a token once to a rank, however many of its experts are there.

Not run yet on GPUs: tests/parallel/test_deepep.py checks calls against the signatures of its ``Buffer``, and results
with a stand-in. Source: deepseek-ai/DeepEP, deep_ep/buffers/legacy.py at 189df346, deep_ep/buffer.py before version 2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.comm import Lane
from parallel.mesh import MeshError
from zoo.dispatch import Dispatcher, Sent


def open_buffer(lane: Lane, *, d_model: int, dtype: torch.dtype) -> Any:
    """Memory that ranks of ep exchange rows of D numbers through (objects over ep); one for all layers.

    Raises:
        MeshError: the numbers are not bf16, or DeepEP is not installed.
    """
    if dtype is not torch.bfloat16:
        raise MeshError(f"parallel.dispatch=deepep: sends bf16, precision.compute is {dtype}".replace("torch.", ""))
    try:
        from deep_ep import Buffer  # type: ignore[import-not-found]
    except ImportError as error:
        raise MeshError(
            "parallel.dispatch=deepep: the package deep_ep is not installed (github.com/deepseek-ai/DeepEP says how); "
            "parallel.dispatch=all_to_all needs none"
        ) from error
    row = d_model * dtype.itemsize
    configs = (Buffer.get_dispatch_config(lane.size), Buffer.get_combine_config(lane.size))
    nvl = max(config.get_nvl_buffer_size_hint(row, lane.size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row, lane.size) for config in configs)
    return Buffer(lane.group, num_nvl_bytes=nvl, num_rdma_bytes=rdma)


class Flight:
    """What DeepEP tells of one exchange.

    Attributes:
        buffer: of DeepEP.
        handle: to send results, or gradients, the same ways.
        counts: rows of each expert that is here.
        event: to wait for.
    """

    handle: Any
    counts: list[int]
    event: Any

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, n_experts: int, flight: Flight
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that chose an expert here, their weights (0 for others) and choices, counted from here, or -1."""
        buffer = ctx.buffer = flight.buffer
        per_rank, per_node, per_expert, goes, _ = buffer.get_dispatch_layout(chosen, n_experts)
        rows, choices, scales, flight.counts, flight.handle, flight.event = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            topk_idx=chosen,
            topk_weights=weights,
            async_finish=True,
        )
        ctx.handle = flight.handle
        ctx.mark_non_differentiable(choices)
        return rows, scales, choices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weights, _ = ctx.buffer.combine(grads[0].contiguous(), ctx.handle, topk_weights=grads[1].contiguous())
        return d_x, d_weights, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: Flight) -> Tensor:
        ctx.buffer, ctx.handle = flight.buffer, flight.handle
        result: Tensor = ctx.buffer.combine(y, ctx.handle)[0]
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.buffer.dispatch(grads[0].contiguous(), handle=ctx.handle)[0], None


@dataclass
class Flown(Sent):
    """Tokens of all ranks with a choice here: ``slots`` are of their choices, ``weights`` are theirs, (R, S).

    Attributes:
        flight: on which they came.
        early: whether weights multiply what goes into an expert.
        choices: (R, S) of experts here, -1 for one elsewhere.
    """

    flight: Flight
    early: bool
    choices: Tensor


class DeepDispatcher(Dispatcher):
    """As ``parallel.expert.ExpertDispatcher``; weights go along, and a rank adds up its experts' results of a token."""

    travels = True

    def __init__(self, buffer: Any) -> None:
        super().__init__()
        self.buffer = buffer

    def dispatch(self, x: Tensor, chosen: Tensor, *, n_experts: int, weights: Tensor, early: bool = False) -> Flown:
        """As ``Dispatcher``; tokens are on their way (DeepEP's dispatch over ep; its combine in the backward)."""
        slots, load = self._sorted(chosen, n_experts)
        flight = Flight(self.buffer)
        tokens, scales, choices = _Dispatch.apply(x, weights.float(), chosen, n_experts, flight)
        return Flown(tokens, load, slots, scales, load, flight, early, choices)

    def arrived(self, sent: Sent) -> Sent:
        """Wait for the tokens, and copy each once for each of its experts here."""
        assert isinstance(sent, Flown), f"{type(sent)=}"
        sent.flight.event.current_stream_wait()
        counts, choices = torch.tensor(sent.flight.counts, device=sent.rows.device), sent.choices.flatten()
        elsewhere = choices.where(choices >= 0, len(sent.flight.counts))
        slots = elsewhere.argsort(stable=True)[: sum(sent.flight.counts)]
        rows = sent.rows.index_select(0, slots // sent.choices.shape[1])
        if sent.early:
            rows = rows * sent.weights.flatten()[slots].to(rows.dtype)[:, None]
        return Flown(**(vars(sent) | {"rows": rows, "counts": counts, "slots": slots}))

    def combine(self, y: Tensor, sent: Sent) -> Tensor:
        """As ``Dispatcher``, of results on all ranks (DeepEP's combine over ep; its dispatch in the backward)."""
        assert isinstance(sent, Flown), f"{type(sent)=}"
        if not sent.early:
            y = y * sent.weights.flatten()[sent.slots].to(y.dtype)[:, None]
        wide = torch.promote_types(y.dtype, torch.float32)
        sums = y.new_zeros(sent.choices.shape[0], y.shape[1], dtype=wide)
        sums = sums.index_add(0, sent.slots // sent.choices.shape[1], y.to(wide)).to(y.dtype)
        result: Tensor = _Combine.apply(sums, sent.flight)
        return result
