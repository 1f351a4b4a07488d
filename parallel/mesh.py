"""The grid of ranks, one named axis for each way of sharing."""

import gc
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.comm import Lane
from parallel.config import Sizes


class MeshError(ValueError):
    """A plan that this host cannot carry out, in one line."""


@dataclass
class Mesh:
    """Where this process stands.

    Attributes:
        sizes: of the axes.
        device: of this rank.
        grid: torch's mesh with axes dp_replicate, dp_shard and, where layers are shared, tp; None for a single process,
            which has no process group.
        rank: of all.
    """

    sizes: Sizes
    device: torch.device
    grid: DeviceMesh | None
    rank: int

    @property
    def dp_rank(self) -> int:
        """Which share of the rows is this rank's."""
        return self.rank // self.sizes.tp

    @property
    def tp_rank(self) -> int:
        """Which share of every layer is this rank's."""
        return self.rank % self.sizes.tp

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks along ``axis`` (dp, dp_replicate, dp_shard or tp); None where this rank is the only one."""
        if self.grid is None or (axis == "tp" and self.sizes.tp == 1) or (axis != "tp" and self.sizes.dp == 1):
            return None
        if axis == "dp" and self.sizes.tp == 1:
            return dist.group.WORLD
        return self.grid.get_group(axis)

    @property
    def lane(self) -> Lane | None:
        """The ranks that share every layer; None where there is only this one."""
        group = self.group("tp")
        return None if group is None else Lane(group, self.tp_rank, self.sizes.tp)

    def split(self, *, copies: int) -> DeviceMesh:
        """The grid with axes tp_piece and tp_copy in the place of tp: neighbours have copies (groups: all axes)."""
        assert self.grid is not None and self.sizes.tp % copies == 0, f"{self.sizes=} {copies=}"
        return self.grid._unflatten("tp", (self.sizes.tp // copies, copies), ("tp_piece", "tp_copy"))

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
    if sizes.ranks == 1:
        return Mesh(sizes, device, None, rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return Mesh(sizes, device, lay_out(sizes, kind=kind), rank)


def lay_out(sizes: Sizes, *, kind: str) -> DeviceMesh:
    """Name the ranks of the process group by their places, tp innermost (all axes)."""
    names, shape = ("dp_replicate", "dp_shard"), (sizes.dp_replicate, sizes.dp_shard)
    if sizes.tp == 1:
        return init_device_mesh(kind, shape, mesh_dim_names=names)
    grid = init_device_mesh(kind, (*shape, sizes.tp), mesh_dim_names=(*names, "tp"))
    grid[names]._flatten("dp")
    return grid
