"""Plans fitted to a number of processes, a model and a batch: pure functions, without torch, for login nodes too."""

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.config import Dispatch, ParallelConfig, PipelineConfig, ScheduleName

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Of the grid of ranks, outermost first: neighbours in the last one talk most."""


@dataclass
class Sizes:
    """A plan fitted to a number of ranks."""

    dp_replicate: int
    dp_shard: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: bool = True

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks that FSDP shards a parameter over."""
        return self.dp_shard * self.cp

    @property
    def expert_ranks(self) -> int:
        """Ranks that share one copy of all experts of a layer, by ep and FSDP."""
        return self.fsdp if self.expert_tp else self.fsdp * self.tp

    @property
    def edp(self) -> int:
        """Ranks that FSDP shards an expert over."""
        return self.expert_ranks // self.ep

    def cuts(self) -> dict[str, int]:
        """Sizes other than of data parallelism that are above one, by their names."""
        return {name: n for name in ("pp", "cp", "ep", "tp") if (n := getattr(self, name)) > 1}


def fit(config: ParallelConfig, *, world_size: int) -> Sizes:
    """Fit a plan to ``world_size`` ranks.

    Raises:
        ValueError: a size is not positive, the sizes do not multiply to the number of ranks, experts cannot be laid
            over them, or something is asked for what needs several ranks of an axis that has one.
    """
    for key in (*AXES, "ep"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ValueError(f"parallel.{key}={value}: must be 1 or more")
    inner = config.tp * config.cp * config.pp
    shard = config.dp_shard
    if shard is None:
        if world_size % (config.dp_replicate * inner):
            subject = "their product must" if inner > 1 else "must"
            raise ValueError(f"{_named(config)}: {subject} divide the number of processes ({world_size})")
        shard = world_size // (config.dp_replicate * inner)
    if config.dp_replicate * shard * inner != world_size:
        raise ValueError(f"{_named(config, shard=shard)}: their product must be the number of processes ({world_size})")
    sizes = Sizes(config.dp_replicate, shard, config.tp, config.pp, config.cp, config.ep, config.expert_tp)
    _check_experts(sizes)
    if config.offload and world_size == 1:
        raise ValueError("parallel.offload=true: must be false in a single process, where FSDP2 shards nothing")
    if config.offload and sizes.dp * sizes.cp == 1:
        axes = " and ".join(f"parallel.{name}={getattr(sizes, name)}" for name in ("pp", "tp") if name in sizes.cuts())
        takes = "take" if " and " in axes else "takes"
        raise ValueError(f"parallel.offload=true: must be false where {axes} {takes} all processes")
    if config.async_tp and sizes.tp == 1:
        raise ValueError("parallel.async_tp=true: must be false where parallel.tp=1")
    if config.dispatch is Dispatch.deepep and sizes.ep == 1:
        raise ValueError("parallel.dispatch=deepep: must be all_to_all where parallel.ep=1")
    return sizes


def _check_experts(sizes: Sizes) -> None:
    """Whether groups of ep ranks can be laid over those that share a copy.

    Raises:
        ValueError: they cannot.
    """
    if sizes.expert_ranks % sizes.ep:
        axes = {"dp_shard": sizes.dp_shard, "cp": sizes.cp, **({} if sizes.expert_tp else {"tp": sizes.tp})}
        product = " x ".join(f"parallel.{key}={n}" for key, n in axes.items() if n > 1 or key == "dp_shard")
        raise ValueError(f"parallel.ep={sizes.ep}: must divide {product}")
    if not sizes.expert_tp and sizes.ep % sizes.tp:
        raise ValueError(
            f"parallel.ep={sizes.ep}: must be a multiple of parallel.tp ({sizes.tp}) where parallel.expert_tp=false"
        )


def _named(config: ParallelConfig, *, shard: int | None = None) -> str:
    """The sizes that were asked for, by their keys; pp, cp and tp only where there is more than one."""
    parts: dict[str, int | None] = {
        name: n if (n := getattr(config, name)) > 1 or name == "dp_replicate" else None
        for name in AXES
        if name != "dp_shard"
    }
    parts["dp_shard"] = shard
    return ", ".join(f"parallel.{key}={parts[key]}" for key in AXES if parts[key] is not None)


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


def stages_a_rank(config: PipelineConfig) -> int:
    """How many stages each rank of pp has."""
    per_rank = {ScheduleName["1f1b"]: 1, ScheduleName.interleaved: config.virtual}
    return per_rank.get(config.schedule, 2)


def microbatches(config: PipelineConfig, *, accumulation: int) -> int:
    """Micro-batches that go through the stages at once, of the ``accumulation`` ones of an update."""
    return accumulation if config.microbatches is None else config.microbatches


def check_pipeline(plan: ParallelConfig, *, n_layers: int, accumulation: int) -> None:
    """Whether stages and micro-batches are as many as a schedule needs.

    Raises:
        ValueError: they are not, or the schedule takes the backward apart, which torch.compile does not.
    """
    c, key = plan.pipeline, "parallel.pipeline"
    for name in ("virtual", "microbatches"):
        value = getattr(c, name)
        if value is not None and value < 1:
            raise ValueError(f"{key}.{name}={value}: must be 1 or more")
    if plan.pp == 1:
        return
    if c.schedule is ScheduleName.interleaved and c.virtual < 2:
        raise ValueError(f"{key}.virtual={c.virtual}: must be 2 or more")
    stages, n = plan.pp * stages_a_rank(c), microbatches(c, accumulation=accumulation)
    if stages > n_layers + 2:
        raise ValueError(
            f"parallel.pp={plan.pp}, {key}.schedule={c.schedule}: {stages} stages must be at most the layers, the "
            f"embedding and the head of the model ({n_layers + 2})"
        )
    if accumulation % n:
        raise ValueError(f"{key}.microbatches={n}: must divide the micro-batches of an update ({accumulation})")
    if plan.compile and c.schedule in (ScheduleName.zbv, ScheduleName.dualpipev):
        raise ValueError(
            f"parallel.compile=true: must be false under {key}.schedule={c.schedule}, which takes the backward apart"
        )


def check_context(plan: ParallelConfig, *, seq_len: int) -> None:
    """Whether the tokens of a row can be cut over cp, twice a rank, and then over tp.

    Raises:
        ValueError: they cannot.
    """
    parts = 2 * plan.cp * plan.tp
    if plan.cp > 1 and seq_len % parts:
        by = f"2 x parallel.cp ({plan.cp})" + (f" x parallel.tp ({plan.tp})" if plan.tp > 1 else "")
        raise ValueError(f"train.seq_len={seq_len}: must be a multiple of {by}")
