"""Sharding by FSDP2: each block's parameters are gathered when it runs. Source: torch.distributed.fsdp.fully_shard."""

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.mesh import Mesh
from zoo.decoder import Decoder


def shard(model: Decoder, mesh: Mesh, *, compute: torch.dtype, params: torch.dtype) -> None:
    """Shard over dp_shard and replicate over dp_replicate: blocks, MTP modules, then the rest as one group."""
    assert mesh.grid is not None, f"{mesh=}"
    grid = mesh.grid["dp_shard"] if mesh.sizes.dp_replicate == 1 else mesh.grid
    # Activations are cast by the model itself; gathered weights come in the dtype of the products and gradients are
    # summed in that of the parameters.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=params, cast_forward_inputs=False)
    for module in [*model.blocks.values(), *model.mtp, model]:
        fully_shard(module, mesh=grid, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        # Losses are divided by global counts before backward, so gradients are summed, not averaged; and gloo has no
        # premultiplied sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: Decoder, *, now: bool) -> None:
    """Choose whether the next backward reduces gradients over dp, or only adds them up on this rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
