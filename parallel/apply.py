"""Spread a model, then give its parts their values."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.compiled import compiled
from parallel.config import Dtype, ParallelConfig, PrecisionConfig, Remat, Reshard
from parallel.fsdp import shard
from parallel.kernels import choose_kernels, told
from parallel.mesh import Mesh
from parallel.reduce import local, part, views
from parallel.remat import recomputed
from parallel.tensor import share_layers
from zoo.block import Block
from zoo.catalogue import stand_in_note
from zoo.config import ModelConfig
from zoo.context import Context
from zoo.count import parameters
from zoo.decoder import Decoder
from zoo.init import fill_initial
from zoo.linear import product_dtype
from zoo.router import Tally

DTYPES = {Dtype.fp64: torch.float64, Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


def build(
    config: ModelConfig,
    *,
    mesh: Mesh,
    precision: PrecisionConfig,
    plan: ParallelConfig | None = None,
    compiler: str = "inductor",
) -> Decoder:
    """A spread model without values: made on the meta device, so that no rank ever holds all of it.

    Args:
        config: what to build.
        mesh: the processes, whose sizes the plan has been fitted to.
        precision: dtypes.
        plan: all else; None: its defaults.
        compiler: backend of torch.compile; tests take one that generates no code.

    Raises:
        MeshError: the kernel of attention that is wanted cannot do what a layer needs.
    """
    plan = ParallelConfig() if plan is None else plan
    params, compute = DTYPES[precision.params], DTYPES[precision.compute]
    with torch.device("meta"):
        model = Decoder(config).to(params)
    if mesh.lane is not None:
        share_layers(model, mesh)
    model.compute_dtype = compute
    choose_kernels(model, plan.kernel, device=mesh.device, dtype=compute)
    _change_blocks(model, plan, compiler=compiler)
    if mesh.group("dp") is not None:
        shard(model, mesh, compute=compute, params=params, plan=plan)
    model.to_empty(device="cpu" if plan.offload else mesh.device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):  # never offloaded: what computes reads and writes them
            setattr(module, name, torch.zeros_like(buffer, device=mesh.device))  # keeps it out of checkpoints or in
    return model


def _change_blocks(model: Decoder, plan: ParallelConfig, *, compiler: str) -> None:
    """Recompute and compile blocks, in this order, where there is a backward; evaluation runs them as they are.

    Blocks get a class derived from theirs, as FSDP2 gives them one: no module is wrapped, so that all names stay.
    """
    if plan.remat is Remat.none and not plan.compile:
        return
    forward = Block.forward if plan.remat is Remat.none else recomputed(Block.forward, how=plan.remat)
    if plan.compile:
        forward = compiled(forward, backend=compiler)

    def run(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        return forward(block, x, context) if torch.is_grad_enabled() else Block.forward(block, x, context)

    blocks = [*model.layers(), *(mtp.block for mtp in model.depths())]
    changed = {kind: type(kind.__name__, (kind,), {"forward": run}) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.__class__ = changed[type(block)]


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], value: Callable[[str, torch.Size], Tensor]) -> None:
    """Set tensors of a spread model from their whole values; each rank keeps its part, without communication.

    Args:
        targets: parameters, as ``reduce.views`` gives them, or buffers by name.
        value: gives the whole tensor of a name and shape.
    """
    for name, target in targets.items():
        tensor = value(name, target.shape)
        local(target).copy_(tensor[part(target)] if isinstance(target, DTensor) else tensor)


def fill_fresh(model: Decoder, *, seed: int) -> None:
    """Initial values, the same under every plan; each rank makes its part alone, without communication."""
    for name, parameter in views(model, dict(model.named_parameters())).items():
        fill_initial(
            local(parameter),
            name=name,
            shape=parameter.shape,
            config=model.config,
            seed=seed,
            part=part(parameter) if isinstance(parameter, DTensor) else None,
        )


def describe(model: Decoder, *, mesh: Mesh, precision: PrecisionConfig, plan: ParallelConfig, choice: str) -> str:
    """What was built and chosen, in one line for the start of a run.

    Args:
        model: what ``build`` made.
        mesh: its processes.
        precision: its dtypes.
        plan: how it is spread and run.
        choice: the file that was chosen for it, which may stand in for another model.
    """
    counted = parameters(model.config)
    parts = [note] if (note := stand_in_note(choice)) else []
    parts.append(f"{model.config.family} {counted.total / 1e6:,.1f}M parameters")
    if counted.active != counted.total:
        parts[-1] += f" ({counted.active / 1e6:,.1f}M active)"
    if counted.mtp:
        parts.append(f"multi-token prediction {counted.mtp / 1e6:,.1f}M")
    sizes = [mesh.sizes.dp_replicate, mesh.sizes.dp_shard, *([mesh.sizes.tp] if mesh.sizes.tp > 1 else [])]
    parts.append(f"{' x '.join(map(str, sizes))} ranks on {mesh.device.type}")
    products = product_dtype(DTYPES[precision.compute], mesh.device.type)
    by_way = "" if products is DTYPES[precision.compute] else f" by way of {products}".replace("torch.", "")
    parts.append(f"{precision.params.value} parameters, {precision.compute.value} products{by_way}")
    return "; ".join([*parts, *told(model), *_told_plan(plan, mesh)])


def _told_plan(plan: ParallelConfig, mesh: Mesh) -> list[str]:
    """What a plan does beside spreading, in a few words each."""
    parts = []
    if mesh.sizes.dp_shard > 1:
        parts.append("ZeRO-2" if plan.reshard is Reshard.never else "ZeRO-3")
    if plan.offload:
        parts.append("parameters and optimizer state in the memory of the host")
    if plan.remat is not Remat.none:
        parts.append(f"recompute: {plan.remat}")
    if plan.compile:
        parts.append("blocks compiled")
    return parts
