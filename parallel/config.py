"""The plan: how many ranks share what, and in which precision. Sizes are checked by pure functions, without torch."""

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


@dataclass
class ParallelConfig:
    """Sizes of the axes of the grid of ranks, and what computes on each."""

    dp_replicate: int = MISSING  # copies of the model, each sharded over dp_shard ranks
    dp_shard: int | None = MISSING  # ranks that share one copy (FSDP); null: all that are left
    kernel: KernelChoice = MISSING  # of attention


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

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard


def fit(config: ParallelConfig, *, world_size: int) -> Sizes:
    """Fit a plan to ``world_size`` ranks.

    Raises:
        ValueError: a size is not positive, or the sizes do not multiply to the number of ranks.
    """
    for key in ("dp_replicate", "dp_shard"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ValueError(f"parallel.{key}={value}: must be 1 or more")
    shard = config.dp_shard
    if shard is None:
        if world_size % config.dp_replicate:
            raise ValueError(
                f"parallel.dp_replicate={config.dp_replicate}: must divide the number of processes ({world_size})"
            )
        shard = world_size // config.dp_replicate
    if config.dp_replicate * shard != world_size:
        raise ValueError(
            f"parallel.dp_replicate={config.dp_replicate}, parallel.dp_shard={shard}: their product must be "
            f"the number of processes ({world_size})"
        )
    return Sizes(config.dp_replicate, shard)


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
