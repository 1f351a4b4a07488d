"""Validation loss."""

from collections.abc import Sequence

import torch

from parallel import reduce
from parallel.mesh import Mesh
from trainer.engine import TorchEngine
from trainer.stream import Batch


@torch.no_grad()
def evaluate(engine: TorchEngine, batches: Sequence[Batch], mesh: Mesh) -> float:
    """Mean cross-entropy in nats a target over all ranks' batches (parameters over fsdp, losses over dp and cp)."""
    engine.model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        total[0] += engine.losses(batch, rows=None, depths=0)[0]
        total[1] += (batch.targets >= 0).sum().to(mesh.device)
    engine.model.train()
    reduce.total(total[:1], mesh, axis="cp")  # whose ranks know all targets of their rows
    loss, targets = reduce.total(total, mesh).tolist()
    return loss / max(targets, 1.0)
