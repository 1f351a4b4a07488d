"""Spread a model, then give its parts their values."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.async_tp import overlap
from parallel.comm import Lane
from parallel.compiled import compiled, compiled_around_travels, travels
from parallel.config import Dispatch, Dtype, ParallelConfig, PrecisionConfig, Remat, Reshard
from parallel.context_kernels import share_rows
from parallel.deepep import DeepDispatcher, open_buffer
from parallel.expert import join_routers, share_experts
from parallel.fsdp import shard
from parallel.kernels import choose_kernels, told
from parallel.layout import Place, places, stored_name
from parallel.mesh import Mesh
from parallel.partition import stages_of
from parallel.pipeline import Pipeline
from parallel.reduce import local, part, views
from parallel.remat import BlockForward, recomputed
from parallel.spread import SharedDecoder
from parallel.tensor import become, share_layers
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
    seq_len: int | None = None,
    compiler: str = "inductor",
) -> Decoder | Pipeline:
    """A spread model without values, or this rank's stages of one: on the meta device first, so that no rank holds all.

    Args:
        config: what to build.
        mesh: the processes, whose sizes the plan has been fitted to.
        precision: dtypes.
        plan: all else; None: its defaults.
        seq_len: tokens of a row, which say what a stage's attention costs; None: as many as the model is made for.
        compiler: backend of torch.compile; tests take one that generates no code.

    Raises:
        MeshError: the kernel of attention that is wanted cannot do what a layer needs.
    """
    plan = ParallelConfig() if plan is None else plan
    params, compute = DTYPES[precision.params], DTYPES[precision.compute]
    with torch.device("meta"):
        whole = Decoder(config).to(params)
    where = places(whole, config=config, mesh=mesh) if mesh.sizes.cuts() else {}
    stages, lane = {0: whole}, mesh.lane("pp")
    if lane is not None:
        of = seq_len or config.context
        mine = stages_of(config, plan.pipeline, pp=lane.size, rank=lane.rank, seq_len=of)
        with torch.device("meta"):
            stages = {number: Decoder(config, part).to(params) for number, part in mine.items()}
    for stage in stages.values():
        _spread(stage, where, mesh=mesh, plan=plan, compute=compute)
        stage.compute_dtype = compute
        choose_kernels(stage, plan.kernel, device=mesh.device, dtype=compute)
        _change_blocks(stage, plan, compiler=compiler)
        if mesh.sizes.dp * mesh.sizes.cp > 1:
            shard(stage, mesh, compute=compute, params=params, plan=plan)
        _materialise(stage, mesh, parameters="cpu" if plan.offload else mesh.device)
    return whole if lane is None else _pipeline(config, stages, where, lane=lane, mesh=mesh, plan=plan)


def _pipeline(
    config: ModelConfig,
    stages: Mapping[int, Decoder],
    where: Mapping[str, Place],
    *,
    lane: Lane,
    mesh: Mesh,
    plan: ParallelConfig,
) -> Pipeline:
    """This rank's stages as one model."""
    recomputes = plan.remat is not Remat.none
    model = Pipeline(config, stages, plan=plan.pipeline, lane=lane, device=mesh.device, recomputes=recomputes)
    model.places = dict(where)
    return model


def _spread(
    stage: Decoder, where: Mapping[str, Place], *, mesh: Mesh, plan: ParallelConfig, compute: torch.dtype
) -> None:
    """Cut a model or a stage on the meta device to what this rank has, in place: layers, then experts, then rows."""
    if not where:
        return
    tp, ep, cp = mesh.lane("tp"), mesh.lane("ep"), mesh.lane("cp")
    if tp is not None:
        share_layers(stage, tp, places=where)
    if ep is not None:
        dispatcher = None
        if plan.dispatch is Dispatch.deepep:
            dispatcher = partial(DeepDispatcher, open_buffer(ep, d_model=stage.config.d_model, dtype=compute))
        share_experts(stage, ep, tp=tp, expert_tp=mesh.sizes.expert_tp, dispatcher=dispatcher)
    if tp is not None and plan.async_tp:
        overlap(stage, tp, device=mesh.device)
    if cp is not None:
        share_rows(stage, cp, plan.context)
    apart = tuple(lane for lane in (cp, None if mesh.sizes.expert_tp else tp) if lane is not None)
    if apart:  # routers see some tokens of a row
        join_routers(stage, apart)
    become(stage, SharedDecoder, tp=tp, cp=cp, places=dict(where))


def _materialise(stage: Decoder, mesh: Mesh, *, parameters: torch.device | str) -> None:
    """Give a stage memory, without values."""
    stage.to_empty(device=parameters)
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):  # never offloaded: what computes reads and writes them
            setattr(module, name, torch.zeros_like(buffer, device=mesh.device))  # keeps it out of checkpoints or in


def _change_blocks(model: Decoder, plan: ParallelConfig, *, compiler: str) -> None:
    """Recompute and compile blocks, in this order, where there is a backward; evaluation runs them as they are.

    Blocks get a class derived from theirs, as FSDP2 gives them one: no module is wrapped, so that all names stay.
    """
    if plan.remat is Remat.none and not plan.compile:
        return
    forward: BlockForward = Block.forward
    around = forward  # of blocks whose tokens travel
    if plan.remat is not Remat.none:
        forward = recomputed(Block.forward, how=plan.remat)
        around = recomputed(Block.forward, how=plan.remat, gathers=True)
    if plan.compile:
        forward, around = compiled(forward, backend=compiler), compiled_around_travels(plan.remat, backend=compiler)

    def run(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        chosen = around if travels(block) else forward
        return chosen(block, x, context) if torch.is_grad_enabled() else Block.forward(block, x, context)

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


def fill_fresh(model: Decoder | Pipeline, *, seed: int) -> None:
    """Initial values, the same under every plan; each rank makes its part alone, without communication."""
    for name, parameter in views(model, dict(model.named_parameters())).items():
        fill_initial(
            local(parameter),
            name=stored_name(name),
            shape=parameter.shape,
            config=model.config,
            seed=seed,
            part=part(parameter) if isinstance(parameter, DTensor) else None,
        )


def describe(
    model: Decoder | Pipeline, *, mesh: Mesh, precision: PrecisionConfig, plan: ParallelConfig, choice: str
) -> str:
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
    data = {"dp_replicate": mesh.sizes.dp_replicate, "dp_shard": mesh.sizes.dp_shard}
    sizes = [f"{name} {n}" for name, n in (data | mesh.sizes.cuts()).items() if n > 1]
    parts.append(f"{' x '.join(sizes) or '1 rank'} on {mesh.device.type}")
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
