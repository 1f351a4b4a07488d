"""Which layers a pipeline stage has, and which rank has which stages: pure functions, without torch.distributed.

Stages are runs of neighbouring parts: embedding, each block, and head with norm and multi-token modules; cut so
that the stage that costs most costs least; among such cuts, so that costs are near each other.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from parallel.config import PipelineConfig, ScheduleName
from parallel.config_fit import stages_a_rank
from zoo.config import ModelConfig
from zoo.count import forward_flops
from zoo.decoder import Part

LOOPED = (ScheduleName["1f1b"], ScheduleName.interleaved)
"""Schedules whose stages go round the ranks; those of the others go down them and up again, a V."""


def stages_of(config: ModelConfig, plan: PipelineConfig, *, pp: int, rank: int, seq_len: int) -> dict[int, Part]:
    """What rank ``rank`` of ``pp`` has of a model, by number of its stages, the first one first.

    Args:
        config: of the whole model.
        plan: which schedule runs it.
        pp: ranks along the axis; 1: the whole model is the one stage.
        rank: of them.
        seq_len: tokens of a row, which say how much attention costs.
    """
    n = 1 if pp == 1 else pp * stages_a_rank(plan)
    cut = parts(config, n_stages=n, seq_len=seq_len)
    return {stage: cut[stage] for stage in range(n) if rank_of(stage, plan.schedule, pp=pp) == rank}


def rank_of(stage: int, schedule: ScheduleName, *, pp: int) -> int:
    """Which rank of ``pp`` has a stage.

    Example: of three ranks, stages 0 to 5 are on 0 1 2 0 1 2 in a loop, and on 0 1 2 2 1 0 in a V.
    """
    place = stage % pp
    return place if schedule in LOOPED or stage < pp else pp - 1 - place


def parts(config: ModelConfig, *, n_stages: int, seq_len: int) -> list[Part]:
    """The model in ``n_stages`` stages of balanced forward cost.

    Raises:
        ValueError: it has fewer layers than that needs.
    """
    n = config.n_layers
    if n_stages > n + 2:
        raise ValueError(f"{n_stages} pipeline stages: must be at most the layers, embedding and head ({n + 2})")
    if n_stages == 1:
        return [Part.whole(config)]
    ends = balanced(costs(config, seq_len=seq_len), n=n_stages)
    # Place 0 is the embedding, places 1 to n are blocks, place n + 1 is the head.
    return [
        Part(max(start - 1, 0), min(stop - 1, n), begins=start == 0, ends=stop == n + 2)
        for start, stop in pairwise([0, *ends])
    ]


def costs(config: ModelConfig, *, seq_len: int) -> list[int]:
    """Operations of the forward for one token: of the embedding, each block, and what comes after them.

    The embedding multiplies nothing; it is counted with an operation a number it looks up.
    """
    d = config.d_model
    head = 2 * d * config.vocab_size
    kinds = {kind: forward_flops(block, d_model=d, seq_len=seq_len) for kind, block in config.blocks.items()}
    blocks = [kinds[kind] for kind in config.kinds]
    depth = head + 2 * 2 * d * d + blocks[-1] + d  # multi-token prediction: embedding, projection, block, head
    return [d, *blocks, head + config.n_mtp * depth]


def balanced(sizes: Sequence[int], *, n: int) -> list[int]:
    """Ends of ``n`` runs, none empty, whose largest sum is least; and among such cuts the least sum of squares.

    Example: 1 1 1 3 in two runs are 1 1 1 and 3: ends 3 and 4.
    """
    total = len(sizes)
    assert 1 <= n <= total, f"{n=} {total=}"
    until = [0, *accumulate(sizes)]
    most = _least_largest(until, n=n)
    # best[stop]: least sum of squares of the first ``stop`` places in so many runs, and where the last of them starts.
    best: list[float] = [0, *[float("inf")] * total]
    starts: list[list[int]] = []
    for runs in range(1, n + 1):
        found: list[float] = [float("inf")] * (total + 1)
        origin = [0] * (total + 1)
        for stop in range(runs, total + 1):
            for start in range(stop - 1, runs - 2, -1):
                size = until[stop] - until[start]
                if size > most:
                    break
                if (squares := best[start] + size * size) < found[stop]:
                    found[stop], origin[stop] = squares, start
        best = found
        starts.append(origin)
    ends, stop = [], total
    for origin in reversed(starts):
        ends.append(stop)
        stop = origin[stop]
    return ends[::-1]


def _least_largest(until: Sequence[int], *, n: int) -> int:
    """The least bound that ``n`` runs can keep, none of them empty, of sizes given by their sums from the start on."""
    total = len(until) - 1
    best = list(until)  # of the first places in one run
    for runs in range(2, n + 1):
        best = [
            min((max(best[start], until[stop] - until[start]) for start in range(runs - 1, stop)), default=until[-1])
            for stop in range(total + 1)
        ]
    return best[total]
