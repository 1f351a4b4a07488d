"""Sharding by FSDP2: each block's parameters are gathered when it runs. Source: torch.distributed.fsdp.fully_shard.

While a block computes, FSDP2 gathers the next by itself, backward and (on CUDA, as far as the host runs ahead) forward.
"""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from parallel.config import ParallelConfig, Reshard
from parallel.mesh import Mesh
from zoo.decoder import Decoder
from zoo.experts import Experts


def shard(model: Decoder, mesh: Mesh, *, compute: torch.dtype, params: torch.dtype, plan: ParallelConfig) -> None:
    """Shard over dp_shard and cp, replicate over dp_replicate: blocks, MTP modules, then the rest as one group.

    Experts that ep shares are sharded over edp, whose ranks have the same ones.

    ``plan.reshard`` says whether parameters are kept from the forward to the backward: FSDP2 by itself keeps those of
    the last group, which the backward begins with; stages of a pipeline keep all, which else they would
    gather again for each micro-batch. ``plan.offload`` changes nothing where the device is a CPU.
    """
    assert mesh.grid is not None, f"{mesh=}"
    grid, experts = _axes(mesh.grid, "fsdp"), None if mesh.experts is None else _axes(mesh.experts, "edp")
    # Activations are cast by the model itself; gathered weights come in the dtype of the products and gradients are
    # summed in that of the parameters.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=params, cast_forward_inputs=False)
    own_choice = None if mesh.sizes.pp == 1 else False
    reshard = {Reshard.auto: own_choice, Reshard.always: True, Reshard.never: False}[plan.reshard]
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if plan.offload else OffloadPolicy()
    sharded = partial(fully_shard, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload)
    if experts is not None:
        for bank in [module for module in model.modules() if isinstance(module, Experts)]:
            sharded(bank, mesh=experts, shard_placement_fn=partial(_widest, ranks=mesh.sizes.edp))
    for module in [*model.blocks.values(), *model.mtp, model]:
        sharded(module, mesh=grid)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        # Losses are divided by global counts before backward, so gradients are summed, not averaged; and gloo has no
        # premultiplied sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _axes(grid: DeviceMesh, shard: str) -> DeviceMesh:
    """The axes that FSDP shards over and, where there are copies, replicates over."""
    names = grid.mesh_dim_names or ()
    copied = grid.shape[names.index("dp_replicate")] > 1
    return grid["dp_replicate", shard] if copied else grid[shard]


def _widest(parameter: nn.Parameter, *, ranks: int) -> Shard:
    """Which dimension of an expert bank is sharded: experts, if they are enough for all ranks, else what each gives.

    Example: 4 experts over 8 ranks are cut inside; over 2 ranks each has 2 of them whole.
    """
    inside = parameter.shape[0] % ranks and parameter.shape[1] % ranks == 0
    return Shard(1 if inside else 0)


def sync_gradients(model: nn.Module, *, now: bool) -> None:
    """Choose whether the next backward reduces gradients over dp, or only adds them up on this rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
