"""Sharding by FSDP2: each block's parameters are gathered when it runs. Source: torch.distributed.fsdp.fully_shard.

While a block computes, FSDP2 gathers the next by itself, backward and (on CUDA, as far as the host runs ahead) forward.
"""

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from parallel.config import ParallelConfig, Reshard
from parallel.mesh import Mesh
from zoo.decoder import Decoder


def shard(model: Decoder, mesh: Mesh, *, compute: torch.dtype, params: torch.dtype, plan: ParallelConfig) -> None:
    """Shard over dp_shard and replicate over dp_replicate: blocks, MTP modules, then the rest as one group.

    ``plan.reshard`` says whether parameters are kept from the forward to the backward: FSDP2 by itself keeps those of
    the last group, which the backward begins with. ``plan.offload`` changes nothing where the device is a CPU.
    """
    assert mesh.grid is not None, f"{mesh=}"
    grid = mesh.grid["dp_shard" if mesh.sizes.dp_replicate == 1 else ("dp_replicate", "dp_shard")]
    # Activations are cast by the model itself; gathered weights come in the dtype of the products and gradients are
    # summed in that of the parameters.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=params, cast_forward_inputs=False)
    reshard = {Reshard.auto: None, Reshard.always: True, Reshard.never: False}[plan.reshard]
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if plan.offload else OffloadPolicy()
    for module in [*model.blocks.values(), *model.mtp, model]:
        fully_shard(module, mesh=grid, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload)
        assert isinstance(module, FSDPModule)
        # Losses are divided by global counts before backward, so gradients are summed, not averaged; and gloo has no
        # premultiplied sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: Decoder, *, now: bool) -> None:
    """Choose whether the next backward reduces gradients over dp, or only adds them up on this rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
