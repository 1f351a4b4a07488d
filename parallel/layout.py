"""Where the parts of each parameter lie: which ranks have which piece, so that all of them are one tensor again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from parallel.mesh import Mesh
from parallel.plan import Kind, Share, find, share
from zoo.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """Who has which part of one parameter, besides what FSDP does.

    Attributes:
        grid: ranks of this stage; the first axis has copies, FSDP shards over the second, the rest cut as ``cuts`` say.
        cuts: of the axes of the grid from the third on.
        tp: this rank's share under tensor parallelism.
        ep: this rank's share under expert parallelism; None for what is no expert's.
        copies: the ranks with the same part, whose gradients add up; None where there is no other.
    """

    grid: DeviceMesh
    cuts: tuple[Placement, ...]
    tp: Share
    ep: Share | None
    copies: dist.ProcessGroup | None

    def whole(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the whole, from that of this rank's part as FSDP shards it."""
        whole = self.tp.whole(shape)
        return torch.Size(whole if self.ep is None else self.ep.whole(whole))

    def view(self, x: Tensor) -> DTensor:
        """A parameter, gradient or moment of this place as one tensor over the grid, on the same memory.

        FSDP and the plan may cut the same dimension: the plan's pieces come first, and each is cut by FSDP.
        """
        sharded: Placement = Replicate()
        if isinstance(x, DTensor) and isinstance(x.placements[-1], Shard):
            dim = x.placements[-1].dim
            pieces = [each.pieces for each in (self.ep, self.tp) if each is not None and each.dim == dim]
            sharded = Shard(dim)
            for n in pieces:
                sharded = _StridedShard(dim, split_factor=n)
            assert len(pieces) < 2, f"{self=}"
        shape = self.whole(x.shape)
        return DTensor.from_local(
            (x.to_local() if isinstance(x, DTensor) else x).detach(),
            self.grid,
            [Replicate(), sharded, *self.cuts],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )


def places(model: nn.Module, *, config: ModelConfig, mesh: Mesh) -> dict[str, Place]:
    """Places of the parameters of a whole model without values (groups of ranks are made: all axes).

    Of the whole one also where this rank has some of its layers only: all ranks make the same groups in one order.
    """
    n, rank = (lane.size, lane.rank) if (lane := mesh.lane("tp")) else (1, 0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shares = {name: share(name, shape, config=config, size=n, rank=rank) for name, shape in shapes.items()}
    banks = {name for name in shapes if mesh.sizes.ep > 1 and is_expert(name, config=config)}
    grids = {n: mesh.dense(copies=n) for n in sorted({shares[name].copies for name in shares if name not in banks})}
    found = {}
    for name, mine in shares.items():
        if name in banks:
            found[name] = _bank(mine, n_experts=shapes[name][0], mesh=mesh)
            continue
        grid = grids[mine.copies]
        cuts = () if lane is None else (_cut(mine), Replicate())
        found[name] = Place(grid, cuts, mine, None, grid.get_group("tp_copy") if mine.copies > 1 else None)
    return found


def _bank(mine: Share, *, n_experts: int, mesh: Mesh) -> Place:
    """The place of something that each of a layer's experts has."""
    ep, lane = mesh.lane("ep"), mesh.lane("tp")
    assert ep is not None, f"{mesh.sizes=}"
    experts = Share(0, n=n_experts, pieces=ep.size, copies=1, rank=ep.rank)
    if lane is None or not mesh.sizes.expert_tp:
        return Place(mesh.expert(), (Shard(0),), ALONE, experts, None)
    return Place(mesh.expert(), (Shard(0), _cut(mine)), mine, experts, lane.group if mine.copies > 1 else None)


def _cut(share: Share) -> Placement:
    return Replicate() if share.dim is None else Shard(share.dim)


ALONE = Share(None, n=0, pieces=1, copies=1, rank=0)
"""Of a parameter that tensor parallelism leaves alone."""


def is_expert(name: str, *, config: ModelConfig) -> bool:
    """Whether a parameter holds something of each routed expert."""
    return find(name, config=config).kind is Kind.expert


COPY = "@copy"
"""Ends the name of a parameter that this process has a second time, in another pipeline stage."""


def stored_name(name: str) -> str:
    """Name of a parameter in a whole model.

    Example: embed.weight@copy is embed.weight.
    """
    return name.removesuffix(COPY)


class Placed(nn.Module):
    """A model whose parameters have places.

    Attributes:
        places: by stored name.
        copies: names of parameters that another stage has too, and that count there.
    """

    places: dict[str, Place]
    copies: frozenset[str] = frozenset()

    def sum_copies(self) -> None:
        """Add up the gradients of what several stages have (an exchange over pp); here there is one stage."""
