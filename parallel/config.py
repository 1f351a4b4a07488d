"""The plan: how many ranks share what, and in which precision. Sizes are checked by pure functions, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
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

    auto = "auto"  # those of blocks: FSDP2's own choice
    always = "always"  # all: ZeRO-3, least memory
    never = "never"  # none: ZeRO-2, and with accumulation ZeRO-1: gradients are whole until the last micro-batch


@dataclass
class ParallelConfig:
    """Sizes of the axes of the grid of ranks, and what computes on each."""

    dp_replicate: int = MISSING  # copies of the model, each sharded over dp_shard ranks
    dp_shard: int | None = MISSING  # ranks that share one copy (FSDP); null: all that are left
    tp: int = 1  # ranks that share every layer and the same rows (tensor and sequence parallelism)
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


@dataclass
class Sizes:
    """A plan fitted to a number of ranks."""

    dp_replicate: int
    dp_shard: int
    tp: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.dp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard


def fit(config: ParallelConfig, *, world_size: int) -> Sizes:
    """Fit a plan to ``world_size`` ranks.

    Raises:
        ValueError: a size is not positive, the sizes do not multiply to the number of ranks, or one process is asked
            for what needs several.
    """
    for key in ("dp_replicate", "dp_shard", "tp"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ValueError(f"parallel.{key}={value}: must be 1 or more")
    shard = config.dp_shard
    if shard is None:
        if world_size % (config.dp_replicate * config.tp):
            subject = "their product must" if config.tp > 1 else "must"
            raise ValueError(f"{_named(config)}: {subject} divide the number of processes ({world_size})")
        shard = world_size // (config.dp_replicate * config.tp)
    if config.dp_replicate * shard * config.tp != world_size:
        raise ValueError(f"{_named(config, shard=shard)}: their product must be the number of processes ({world_size})")
    if config.offload and world_size == 1:
        raise ValueError("parallel.offload=true: must be false in a single process, where FSDP2 shards nothing")
    if config.offload and world_size == config.tp:
        raise ValueError(f"parallel.offload=true: must be false where parallel.tp={config.tp} takes all processes")
    return Sizes(config.dp_replicate, shard, config.tp)


def _named(config: ParallelConfig, *, shard: int | None = None) -> str:
    """The sizes that were asked for, by their keys; tp only where there is more than one."""
    parts = {"dp_replicate": config.dp_replicate, "dp_shard": shard, "tp": config.tp if config.tp > 1 else None}
    return ", ".join(f"parallel.{key}={value}" for key, value in parts.items() if value is not None)


def check_tensor(tp: int, *, shared: Mapping[str, int], kv_heads: Mapping[str, int], vocab_size: int) -> None:
    """Whether ``tp`` ranks can share a model, a row's tokens and its vocabulary.

    Args:
        tp: ranks that share every layer.
        shared: by key, what they cut into equal parts.
        kv_heads: by key, numbers of key-value heads: fewer than ranks are copied.
        vocab_size: rows of the vocabulary, of which the last rank may have fewer.

    Raises:
        ValueError: a number does not divide.
    """
    for key, value in shared.items():
        if value % tp:
            raise ValueError(f"parallel.tp={tp}: must divide {key} ({value})")
    for key, value in kv_heads.items():
        if value % tp and tp % value:
            raise ValueError(f"parallel.tp={tp}: must divide {key} ({value}) or be a multiple of it")
    if (tp - 1) * -(-vocab_size // tp) >= vocab_size:
        raise ValueError(f"parallel.tp={tp}: must leave each rank a row of model.vocab_size ({vocab_size})")


def accumulation(*, global_batch: int, micro_batch: int, dp: int) -> int:
    """Micro-batches of one rank in one update.

    Raises:
        ValueError: the global batch cannot be cut so.
    """
    if global_batch % (dp * micro_batch):
        raise ValueError(
            f"train.global_batch={global_batch}: must be a multiple of train.micro_batch ({micro_batch}) times the "
            f"data-parallel ranks ({dp})"
        )
    return global_batch // (dp * micro_batch)
