"""Products that overlap with the gathering and scattering of tokens around them (asynchronous tensor parallelism).

By torch's operators over symmetric memory, which need NVLink between the ranks of tp. Not run yet on GPUs:
tests/parallel/test_async_tp.py runs the operators' own plain form over gloo.

Here alone a Function that communicates takes a parameter; one that is asked for gradients of parameters only, as
zero-bubble schedules do, sends what these need: the tokens again.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor, nn

from parallel.comm import Lane, gather
from parallel.mesh import MeshError
from parallel.tensor import SharedBlock, become
from zoo.activation import activate
from zoo.block import Block
from zoo.context import Context
from zoo.mlp import MLP
from zoo.router import Tally


def gather_product(x: Tensor, weights: Sequence[Tensor], lane: Lane) -> tuple[Tensor, ...]:
    """All tokens times each weight, as tokens arrive (one all-gather over tp; backward one reduce-scatter).

    And in the backward another all-gather, of tokens for the weights' gradients.

    Args:
        x: (B, T/tp, D).
        weights: (d_out, D) each.
        lane: ranks of tp.

    Returns:
        (B, T, d_out) of each.
    """
    return _GatherProduct.apply(lane, x, *weights)


def product_scatter(h: Tensor, weight: Tensor, lane: Lane) -> Tensor:
    """(B, T, F/tp) by (D, F/tp), summed over ranks, to (B, T/tp, D) (one reduce-scatter over tp; backward gathers)."""
    result: Tensor = _ProductScatter.apply(lane, h, weight)
    return result


class _GatherProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lane: Lane, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.lane = lane
        ctx.save_for_backward(x, *weights)
        _, results = torch.ops.symm_mem.fused_all_gather_matmul(
            x, [weight.t() for weight in weights], gather_dim=1, group_name=lane.group.group_name, return_A=False
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        d_x, d_weights = None, list[Tensor | None]([None for _ in weights])
        if ctx.needs_input_grad[1]:
            d_x = torch.ops.symm_mem.fused_matmul_reduce_scatter(
                torch.cat(grads, dim=-1), torch.cat(weights), "sum", scatter_dim=1, group_name=ctx.lane.group.group_name
            )
        if any(ctx.needs_input_grad[2:]):
            tokens = gather(x, ctx.lane).flatten(0, 1)
            d_weights = [grad.flatten(0, 1).t() @ tokens for grad in grads]
        return None, d_x, *d_weights


class _ProductScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lane: Lane, h: Tensor, weight: Tensor) -> Tensor:
        ctx.lane = lane
        ctx.save_for_backward(h, weight)
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            h, weight.t(), "sum", scatter_dim=1, group_name=lane.group.group_name
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        grad, (d_h,) = torch.ops.symm_mem.fused_all_gather_matmul(
            grads[0].contiguous(), [weight], gather_dim=1, group_name=ctx.lane.group.group_name
        )
        return None, d_h, grad.flatten(0, 1).t() @ h.flatten(0, 1)


class OverlappedMLP(MLP):
    """A share of a feed-forward that gathers and scatters tokens as it multiplies."""

    lane: Lane

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T/tp, D) to (B, T/tp, D) (as ``gather_product`` and ``product_scatter``)."""
        into = [self.up] if self.gate is None else [self.up, self.gate]
        products = gather_product(x, [each.weight.to(x.dtype) for each in into], self.lane)
        up, *gate = (
            y if each.bias is None else y + each.bias.to(x.dtype) for y, each in zip(products, into, strict=True)
        )
        h = activate(gate[0] if gate else None, up, self.activation)
        y = product_scatter(h, self.down.weight.to(x.dtype), self.lane)
        return y if self.down.bias is None else y + self.down.bias.to(x.dtype)  # of own tokens: on every rank


class OverlappedBlock(SharedBlock):
    """A layer whose feed-forward gathers by itself."""

    def _feed_forward(self, h: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        return Block._feed_forward(self, h, context)


def overlap(model: nn.Module, lane: Lane, *, device: torch.device) -> None:
    """Overlap feed-forwards of dense layers, of a model that tp has shared, in place (a store's keys over tp).

    Raises:
        MeshError: ``device`` is no GPU.
    """
    if device.type != "cuda":
        raise MeshError(f"parallel.async_tp=true: needs GPUs, this is a {device.type}")
    symmetric.enable_symm_mem_for_group(lane.group.group_name)
    for block in model.modules():
        if isinstance(block, SharedBlock) and block.mlp is not None and block.moe is None:
            become(block.mlp, OverlappedMLP, lane=lane)
            become(block, OverlappedBlock)
