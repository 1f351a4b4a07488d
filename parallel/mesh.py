"""The grid of ranks, one named axis for each way of sharing."""

import gc
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import Sizes


class MeshError(ValueError):
    """A plan that this host cannot carry out, in one line."""


@dataclass
class Mesh:
    """Where this process stands.

    Attributes:
        sizes: of the axes.
        device: of this rank.
        grid: torch's mesh with axes dp_replicate and dp_shard; None for a single process, which has no process group.
        rank: of all.
    """

    sizes: Sizes
    device: torch.device
    grid: DeviceMesh | None
    rank: int

    @property
    def dp_rank(self) -> int:
        """Which share of the rows is this rank's."""
        return self.rank

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks along ``axis`` (dp, dp_replicate or dp_shard); None for a single process."""
        if self.grid is None:
            return None
        return dist.group.WORLD if axis == "dp" else self.grid.get_group(axis)

    def close(self) -> None:
        """Leave the process group (all axes)."""
        if self.grid is not None:
            self.grid = None
            gc.collect()  # what still holds the group, such as a model, would keep its threads alive
            dist.destroy_process_group()


def open_mesh(sizes: Sizes, *, rank: int, local_rank: int) -> Mesh:
    """Join the process group, over NCCL on GPUs and gloo on CPUs, and lay out the grid (all axes).

    Raises:
        MeshError: there are fewer GPUs than processes on this host.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise MeshError(
                f"process {local_rank} of this host has no GPU: there are {torch.cuda.device_count()}; start as many "
                "processes, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(device)
    if sizes.dp == 1:
        return Mesh(sizes, device, None, rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    grid = init_device_mesh(kind, (sizes.dp_replicate, sizes.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return Mesh(sizes, device, grid, rank)
