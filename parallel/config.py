"""The plan: how many ranks share what, and in which precision; parallel/config_fit.py fits it to a run."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class KernelChoice(StrEnum):
    """Which kernel attends (zoo/kernel_choice.py says what each can do)."""

    auto = "auto"  # the best one, layer by layer
    plain = "plain"
    sdpa = "sdpa"
    flex = "flex"
    varlen = "varlen"


class Remat(StrEnum):
    """What a block computes again in the backward, to hold less until then (activation checkpointing)."""

    none = "none"  # nothing
    block = "block"  # everything: each block holds its input only
    selective = "selective"  # all but the results of matrix products and of attention (parallel/remat.py lists them)


class Reshard(StrEnum):
    """Which gathered parameters are given up after the forward and gathered again for the backward."""

    auto = "auto"  # those of blocks, FSDP2's own choice; none where layers are in pipeline stages
    always = "always"  # all: ZeRO-3, least memory
    never = "never"  # none: ZeRO-2, and with accumulation ZeRO-1: gradients are whole until the last micro-batch


class ContextMethod(StrEnum):
    """How ranks that have tokens of the same rows attend to each other's (parallel/context.py)."""

    gather = "gather"  # keys and values of all tokens to every rank; does everything
    ulysses = "ulysses"  # all tokens of some heads to every rank, and back
    ring = "ring"  # keys and values go round, a block at a time; no sinks or softcaps


class Dispatch(StrEnum):
    """How tokens get to experts on other ranks."""

    all_to_all = "all_to_all"  # torch.distributed, any backend
    deepep = "deepep"  # kernels of DeepEP, on GPUs


ScheduleName = StrEnum(
    "ScheduleName",
    {
        "1f1b": "1f1b",
        "interleaved": "interleaved",  # several stages a rank
        "zbv": "zbv",  # zero bubble: two stages a rank in a V, backward in two halves
        "dualpipev": "dualpipev",  # as zbv, with a forward and a backward side by side
    },
)
"""The order in which pipeline stages run micro-batches forward and backward (parallel/schedule.py); 1f1b is no name
that a class could have, and OmegaConf knows members by their names."""


@dataclass
class PipelineConfig:
    """How stages of layers work on micro-batches."""

    schedule: ScheduleName = ScheduleName["1f1b"]
    microbatches: int | None = None  # that go through at once; divides those of an update, which null takes
    virtual: int = 2  # stages a rank under interleaved; the schedules in a V have two, 1f1b has one


@dataclass
class ParallelConfig:
    """Sizes of the axes of the grid of ranks, and what computes on each."""

    dp_replicate: int = MISSING  # copies of the model, each sharded over dp_shard ranks
    dp_shard: int | None = MISSING  # ranks that share one copy (FSDP); null: all that are left
    tp: int = 1  # ranks that share every layer and the same rows (tensor and sequence parallelism)
    pp: int = 1  # ranks that have some layers each, one after another (pipeline)
    cp: int = 1  # ranks that have some tokens of the same rows each (context parallelism)
    ep: int = 1  # ranks that have some experts each; of the dp_shard x cp ranks
    expert_tp: bool = True  # whether tp shares each expert; if not, ep is of the dp_shard x cp x tp ranks
    context: ContextMethod = ContextMethod.gather
    dispatch: Dispatch = Dispatch.all_to_all
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    async_tp: bool = False  # collectives of tp overlapped with their products; on CUDA
    kernel: KernelChoice = KernelChoice.auto  # of attention
    reshard: Reshard = Reshard.auto
    offload: bool = False  # parameters, gradients and the optimizer's state to the memory of the host; needs sharding
    remat: Remat = Remat.none
    compile: bool = False  # each block, by torch.compile


class Dtype(StrEnum):
    """Number formats."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"


PRECISIONS = [(Dtype.fp64, Dtype.fp64), (Dtype.fp32, Dtype.fp32), (Dtype.fp32, Dtype.bf16)]
"""Formats of parameters and of what is computed that go together."""


@dataclass
class PrecisionConfig:
    """Formats of a run."""

    params: Dtype = MISSING  # parameters, their gradients and the optimizer's state
    compute: Dtype = MISSING  # activations and matrix products

    def __post_init__(self) -> None:
        if (self.params, self.compute) not in PRECISIONS:
            allowed = ", ".join(f"{params} with {compute}" for params, compute in PRECISIONS)
            raise ValueError(
                f"precision.params={self.params}, precision.compute={self.compute}: must be {allowed}; parameters and "
                "what is counted beside them need at least fp32: bf16 rounds counts above 256"
            )
