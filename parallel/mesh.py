"""The grid of ranks, one named axis for each way of sharing."""

import gc
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.comm import Lane
from parallel.config_fit import Sizes


class MeshError(ValueError):
    """A plan that this host cannot carry out, in one line."""


@dataclass
class Mesh:
    """Where this process stands.

    Attributes:
        sizes: of the axes.
        device: of this rank.
        grid: torch's mesh with axes pp, dp_replicate, fsdp (dp_shard × cp) and tp, of which pp and tp are there where
            they are above one; None for a single process, which has no process group.
        rank: of all.
        groups: process groups by what sums over them, as ``group`` explains; only of more than one rank.
        experts: the same ranks with axes pp, dp_replicate, edp, ep and, where it shares experts, tp; None without ep.
    """

    sizes: Sizes
    device: torch.device
    grid: DeviceMesh | None
    rank: int
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    experts: DeviceMesh | None = None

    @property
    def dp_rank(self) -> int:
        """Which share of the rows is this rank's."""
        return self.rank // (self.sizes.cp * self.sizes.tp) % self.sizes.dp

    def group(self, what: str) -> dist.ProcessGroup | None:
        """The ranks that a sum goes over; None where this rank is the only one.

        Args:
            what: an axis (pp, dp_replicate, dp_shard, fsdp, cp, tp, ep, edp), or several: dp (different rows), losses
                (different tokens or layers), shards (different parts of one copy of the model), stage (parts or copies
                of the same layers, in the order of the grids).
        """
        assert what in NAMES, f"{what=}"
        return self.groups.get(what)

    def lane(self, axis: str) -> Lane | None:
        """The ranks along an axis and this rank's place among them; None where there is only this one."""
        group = self.group(axis)
        return None if group is None else Lane(group, dist.get_rank(group), dist.get_world_size(group))

    def dense(self, *, copies: int) -> DeviceMesh:
        """This stage's ranks with axes dp_replicate, fsdp, tp_piece and tp_copy: neighbours have copies (all axes)."""
        assert self.grid is not None and self.sizes.tp % copies == 0, f"{self.sizes=} {copies=}"
        if self.sizes.tp == 1:
            return self.grid["dp_replicate", "fsdp"]
        split = self.grid._unflatten("tp", (self.sizes.tp // copies, copies), ("tp_piece", "tp_copy"))
        return split["dp_replicate", "fsdp", "tp_piece", "tp_copy"]

    def expert(self) -> DeviceMesh:
        """This stage's ranks with axes dp_replicate, edp, ep and, where it shares experts, tp."""
        assert self.experts is not None, f"{self.sizes=}"
        names = ("dp_replicate", "edp", "ep", "tp")
        return self.experts[tuple(name for name in names if name in (self.experts.mesh_dim_names or ()))]

    def close(self) -> None:
        """Leave the process group (all axes)."""
        if self.grid is not None:
            self.grid = self.experts = None
            self.groups = {}
            gc.collect()  # what still holds the group, such as a model, would keep its threads alive
            dist.destroy_process_group()


AXES = {"pp", "dp_replicate", "dp_shard", "fsdp", "cp", "tp", "ep", "edp"}
NAMES = AXES | {"dp", "losses", "shards", "stage"}


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
    return lay_out(sizes, device=device, rank=rank)


def lay_out(sizes: Sizes, *, device: torch.device, rank: int) -> Mesh:
    """Name the ranks of a process group that exists by their places, tp innermost (all axes).

    Example: pp 2, dp_shard 2, tp 2: ranks 0 and 1 share layers; 0 and 2 see different rows; 0 and 4 have other layers.
    """
    axes = {"pp": sizes.pp, "dp_replicate": sizes.dp_replicate, "fsdp": sizes.fsdp, "tp": sizes.tp}
    grid = _made(axes, device=device)
    mesh = Mesh(sizes, device, grid, rank)
    split = grid._unflatten("fsdp", (sizes.dp_shard, sizes.cp), ("dp_shard", "cp")) if sizes.cp > 1 else grid
    shard = ("dp_shard", "cp") if sizes.cp > 1 else ("fsdp",)
    parts = {
        "dp": ("dp_replicate", shard[0]),
        "losses": ("pp", "dp_replicate", *shard),
        "shards": ("pp", *shard, "tp"),
        "stage": ("dp_replicate", *shard, "tp"),
    }
    for name in ("pp", "dp_replicate", *shard, "tp"):
        _add_group(mesh, name, split, (name,))
    if sizes.cp > 1:
        _add_group(mesh, "fsdp", grid, ("fsdp",))
    elif "fsdp" in mesh.groups:
        mesh.groups["dp_shard"] = mesh.groups["fsdp"]
    for name, of in parts.items():
        _add_group(mesh, name, split, of)
    if sizes.ep > 1:
        mesh.experts = _expert_grid(sizes, grid=grid, device=device)
        for name in ("edp", "ep"):
            _add_group(mesh, name, mesh.experts, (name,))
    return mesh


def _made(axes: dict[str, int], *, device: torch.device) -> DeviceMesh:
    """A mesh of all ranks; of axes with one rank only those that FSDP wants are in it."""
    there = {name: n for name, n in axes.items() if n > 1 or name not in ("pp", "tp")}
    return init_device_mesh(device.type, tuple(there.values()), mesh_dim_names=tuple(there))


def _expert_grid(sizes: Sizes, *, grid: DeviceMesh, device: torch.device) -> DeviceMesh:
    """All ranks as experts see them: neighbours of fsdp, or of fsdp × tp, are a group of ep."""
    if sizes.expert_tp:
        return grid._unflatten("fsdp", (sizes.edp, sizes.ep), ("edp", "ep"))
    axes = {"pp": sizes.pp, "dp_replicate": sizes.dp_replicate, "edp": sizes.edp, "ep": sizes.ep}
    return _made(axes, device=device)


def _add_group(mesh: Mesh, name: str, grid: DeviceMesh, axes: tuple[str, ...]) -> None:
    """The group of the ranks along some axes of a grid, where they are several; axes next to each other or not."""
    names, shape = grid.mesh_dim_names or (), grid.shape
    there = tuple(axis for axis in axes if axis in names and shape[names.index(axis)] > 1)
    size = prod(shape[names.index(axis)] for axis in there)
    if size == 1:
        return
    if size == dist.get_world_size():
        group = dist.group.WORLD
        assert group is not None
        mesh.groups[name] = group
    elif len(there) == 1:
        mesh.groups[name] = grid.get_group(there[0])
    else:
        mesh.groups[name] = grid[there]._flatten("_".join(there)).get_group()
