"""One rank's part of rows that all ranks read together once, such as those of an evaluation."""

from dataclasses import fields

import torch

from data.batch import NOT_COUNTED, Batch


def share(batch: Batch, *, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
    """Cut ``batch`` for ``rank``: as many micro-batches as every other rank gets, whatever the number of rows.

    Example: 5 rows, 2 ranks, micro_batch 2: rank 0 gets rows 0 1 and 2 3, rank 1 gets 4 4 and 4 4, where only the
    first 4 has targets.
    """
    n_rows = batch.tokens.shape[0]
    per_rank = -(-n_rows // (world_size * micro_batch)) * micro_batch
    wanted = torch.arange(rank * per_rank, (rank + 1) * per_rank)
    taken = wanted.clamp(max=n_rows - 1)
    part = {field.name: getattr(batch, field.name)[taken] for field in fields(Batch)}
    for name in ("targets", "mtp_targets"):
        part[name][wanted >= n_rows] = NOT_COUNTED
    cuts = {name: tensor.split(micro_batch) for name, tensor in part.items()}
    return [Batch(**{name: cut[i] for name, cut in cuts.items()}) for i in range(per_rank // micro_batch)]
