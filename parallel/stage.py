"""A pipeline stage in torch's runtime: what training asks of a forward, and buffers only while they are in use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.stage import _RecvInfo

from parallel.sends import B, Event, F
from zoo.decoder import Objective


class Stage(PipelineStage):
    """A Decoder in torch's runtime: what training asks of it comes as tensors of each micro-batch.

    Attributes:
        asked: of all micro-batches; each brings its own tensors of tokens.
        reduces: whether this run's gradients are summed over FSDP's ranks at its end.
        arrived: is told that a forward or backward has all that it needs.
    """

    asked: Objective
    reduces: bool
    arrived: Callable[[Event], None]

    def forward_maybe_with_nosync(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Run the Decoder on one micro-batch (what its layers communicate)."""
        objective = replace(
            self.asked,
            targets=kwargs["targets"],
            mtp_tokens=kwargs["mtp_tokens"],
            mtp_targets=kwargs["mtp_targets"],
        )
        states: Tensor = self.submod(
            *args, positions=kwargs["positions"], documents=kwargs["documents"], objective=objective
        )
        return states

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Sum gradients over FSDP's ranks, if this run is the last of an update (reduce-scatters over fsdp)."""
        if self.reduces:
            super().perform_reduce_grad(grad_scale_factor)

    # torch keeps a buffer for the states and one for the gradient of every micro-batch: of 120 micro-batches of 4,096
    # tokens 14 GB in DeepSeek-V3, where some 16 are under way. Here they exist while they are in use.

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._weightless():
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._weightless():
            super()._setup_backward_recv_info(num_microbatches)

    @contextmanager
    def _weightless(self) -> Iterator[None]:
        """Buffers that are made meanwhile have a shape and no memory."""
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives the states of a micro-batch, into a new buffer (over pp)."""
        _hold(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives their gradient, into a new buffer (over pp)."""
        _hold(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a micro-batch forward; autograd keeps its input as long as it needs it."""
        self.arrived((self.stage_index, F, fwd_chunk_id))
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _hold(self.args_recv_info[fwd_chunk_id], torch.device("meta"))
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Run a micro-batch backward, or the part for its input."""
        self.arrived((self.stage_index, B, bwd_chunk_id))
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _hold(self.grad_recv_info[bwd_chunk_id], torch.device("meta"))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run the part of a backward for weights; FSDP adds up gradients in the dtype that it sums over ranks in.

        By itself it does so at the end of a whole backward only, and bf16 gradients would be added in bf16 until then.
        """
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for parameter in group.fsdp_params:
                        parameter.accumulate_unsharded_grad_if_needed()
                        parameter.to_accumulated_grad_if_needed()


def _hold(buffers: tuple[_RecvInfo, ...], device: torch.device) -> None:
    """Put new buffers of the same shape in the place of buffers; on the meta device they take no memory."""
    for info in buffers:
        if info.buffer is not None:
            info.buffer = torch.empty_like(info.buffer, device=device, requires_grad=False)


def whole_backward() -> Callable[[], None]:
    """For torch: the part of a backward for the input shall be all of it, and nothing be left for the weights."""
    return lambda: None
