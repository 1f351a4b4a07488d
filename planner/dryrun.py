"""One update of one rank of a plan, at its true size, without its memory, its devices or the other ranks."""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from parallel import reduce
from parallel.apply import describe
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.config_fit import accumulation, fit
from parallel.mesh import Mesh
from planner.config import DeviceKind, HardwareConfig
from planner.fake import KIND, build, pretended, replaced
from planner.live import Live
from planner.report import Memory, Report
from planner.wire import Wire
from trainer import balance, optim
from trainer.config import OptimConfig, TrainConfig
from trainer.engine import Counts, TorchEngine
from zoo.config import ModelConfig
from zoo.dispatch import Dispatcher


@dataclass
class Rows:
    """A micro-batch without values; shapes as in ``trainer.stream.Batch``."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    mtp_tokens: Tensor
    mtp_targets: Tensor

    def to(self, device: torch.device) -> "Rows":
        """Copy every tensor to ``device``."""
        return Rows(**{name: x.to(device) for name, x in vars(self).items()})


def run(
    *,
    model: ModelConfig,
    train: TrainConfig,
    optim_config: OptimConfig,
    plan: ParallelConfig,
    precision: PrecisionConfig,
    hardware: HardwareConfig,
    world_size: int,
    rank: int = 0,
    choice: str = "",
) -> Report:
    """Build a rank's share and trace an update that is not the first (all axes, in name only).

    Args:
        model: what to train.
        train: batches.
        optim_config: the optimizer.
        plan: how it is spread.
        precision: dtypes.
        hardware: what to try it against.
        world_size: processes of the run that is planned.
        rank: which of them to be.
        choice: the file that was chosen for the model, which may stand in for another.

    Returns:
        What it takes and sends; whether it fits is for ``Report.check`` to say.
    """
    started = time.perf_counter()
    sizes, remarks = fit(plan, world_size=world_size), []
    offload = plan.offload and hardware.kind is DeviceKind.cuda
    if plan.compile:
        plan = replace(plan, compile=False)
        remarks.append("blocks are traced as written: compiled ones hold less")
    if offload:
        remarks.append("gradients on their way to the host are counted on the device until the update")
    with pretended(sizes, rank=rank, kind=hardware.kind) as mesh:
        decoder = build(model, mesh=mesh, precision=precision, plan=plan, seq_len=train.seq_len)
        for module in decoder.modules():
            if isinstance(module, Dispatcher):
                module.balanced = True  # who is chosen is a value
        engine = TorchEngine(decoder, mesh=mesh, train=train, optim_config=optim_config)
        batches = _batches(model, train, number=_accumulation(train, mesh))
        title = describe(decoder, mesh=mesh, precision=precision, plan=plan, choice=choice)
        wire = Wire(mesh)
        memory = _trace(engine, batches, live=Live(KIND, wire=wire), offload=offload)
        return Report(
            title=title.replace(f" on {KIND}", f" on {hardware.kind}", 1),
            sizes=sizes,
            rank=rank,
            tokens=(train.micro_batch, train.seq_len),
            micro_batches=len(batches),
            hardware=hardware,
            memory=memory,
            collectives=list(wire.lines.values()),
            seconds=time.perf_counter() - started,
            remarks=remarks,
        )


def _accumulation(train: TrainConfig, mesh: Mesh) -> int:
    return accumulation(global_batch=train.global_batch, micro_batch=train.micro_batch, dp=mesh.sizes.dp)


def _batches(model: ModelConfig, train: TrainConfig, *, number: int) -> list[Rows]:
    """Micro-batches as a loader gives them."""
    shape = (train.micro_batch, train.seq_len)
    further = (train.micro_batch, model.n_mtp, train.seq_len)
    shapes = [shape, shape, shape, shape, further, further]
    return [Rows(*(torch.empty(each, dtype=torch.int64) for each in shapes)) for _ in range(number)]


def _trace(engine: TorchEngine, batches: Sequence[Rows], *, live: Live, offload: bool) -> Memory:
    """Run one update under the eyes of ``live``; with ``offload`` what is the host's is left out."""
    model, optimizer = engine.model, engine.optimizer
    parameters = [reduce.local(parameter) for parameter in model.parameters()]
    moments = [reduce.local(x) for state in optim.state(model, optimizer).values() for x in state.values()]
    buffers = list(model.buffers())
    for label, tensors in (("parameters", parameters), ("optimizer state", moments), ("buffers", buffers)):
        for x in tensors:
            if offload and label != "buffers":
                live.leave_out(x)
            else:
                live.meet(x, label=label)
    device = engine.mesh.device
    ones = torch.ones(1 + model.config.n_mtp, dtype=torch.float64, device=device)
    counts = Counts(ones, torch.ones((), dtype=torch.float64, device=device))
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(*args: Any) -> Any:
        with live.pause():  # of a tensor over all ranks, whose shape DTensor asks for
            return propagate(*args)

    with ExitStack() as stack:
        stack.enter_context(replaced(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen))
        stack.enter_context(live)
        live.phase = "forward and backward"
        engine.forward_backward(batches, counts)
        live.phase = "update"
        gradients = [reduce.local(gradient) for gradient in reduce.gradients(model)]
        whole = live.sizes(gradients)
        engine.update(max_norm=1.0)
        engine.attention()
        there = live.sizes(gradients, until=live.peak.clock)
        balance.update(model, engine.mesh)
    at_peak = live.peak.by - there
    at_peak["gradients"] = there.total()
    return Memory(
        parameters=held(parameters),
        gradients=whole.total(),
        optimizer=held(moments),
        buffers=held(buffers),
        peak=live.peak.total,
        at_peak={label: size for label, size in at_peak.most_common() if size},
        phase=live.peak.phase,
        offloaded=offload,
    )


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())
