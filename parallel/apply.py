"""Spread a model, then give its parts their values."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.config import Dtype, KernelChoice, PrecisionConfig
from parallel.fsdp import shard
from parallel.kernels import choose_kernels, told
from parallel.mesh import Mesh
from zoo.catalogue import stand_in_note
from zoo.config import ModelConfig
from zoo.count import parameters
from zoo.decoder import Decoder
from zoo.init import initial
from zoo.linear import product_dtype

DTYPES = {Dtype.fp64: torch.float64, Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


def build(
    config: ModelConfig, *, mesh: Mesh, precision: PrecisionConfig, kernel: KernelChoice = KernelChoice.auto
) -> Decoder:
    """A spread model without values: made on the meta device, so that no rank ever holds all of it.

    Raises:
        MeshError: the kernel of attention that is wanted cannot do what a layer needs.
    """
    params, compute = DTYPES[precision.params], DTYPES[precision.compute]
    with torch.device("meta"):
        model = Decoder(config).to(params)
    model.compute_dtype = compute
    choose_kernels(model, kernel, device=mesh.device, dtype=compute)
    if mesh.grid is not None:
        shard(model, mesh, compute=compute, params=params)
    model.to_empty(device=mesh.device)
    for buffer in model.buffers():
        buffer.zero_()
    return model


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], value: Callable[[str, torch.Size], Tensor]) -> None:
    """Set tensors of a spread model from their whole values; each rank keeps its part, without communication.

    Args:
        targets: parameters or buffers by name.
        value: gives the whole tensor of a name and shape.
    """
    for name, target in targets.items():
        tensor = value(name, target.shape).to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor):
            tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(tensor)


def fill_fresh(model: Decoder, *, seed: int) -> None:
    """Initial values, the same under every plan."""
    fill(dict(model.named_parameters()), lambda name, shape: initial(name, shape, config=model.config, seed=seed))


def describe(model: Decoder, *, mesh: Mesh, precision: PrecisionConfig, choice: str) -> str:
    """What was built and chosen, in one line for the start of a run.

    Args:
        model: what ``build`` made.
        mesh: its processes.
        precision: its dtypes.
        choice: the file that was chosen for it, which may stand in for another model.
    """
    counted = parameters(model.config)
    parts = [note] if (note := stand_in_note(choice)) else []
    parts.append(f"{model.config.family} {counted.total / 1e6:,.1f}M parameters")
    if counted.active != counted.total:
        parts[-1] += f" ({counted.active / 1e6:,.1f}M active)"
    if counted.mtp:
        parts.append(f"multi-token prediction {counted.mtp / 1e6:,.1f}M")
    parts.append(f"{mesh.sizes.dp_replicate} x {mesh.sizes.dp_shard} ranks on {mesh.device.type}")
    products = product_dtype(DTYPES[precision.compute], mesh.device.type)
    by_way = "" if products is DTYPES[precision.compute] else f" by way of {products}".replace("torch.", "")
    parts.append(f"{precision.params.value} parameters, {precision.compute.value} products{by_way}")
    return "; ".join([*parts, *told(model)])
