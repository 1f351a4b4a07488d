"""What a rank sends: every collective that a program calls, by the axis whose ranks take part, with its bytes.

Bytes are those that leave a rank when n ranks pass a tensor of S bytes round a ring, as NCCL does with much data: in
an all-gather and a reduce-scatter (n − 1)/n · S, in an all-reduce twice that, in an all-to-all what is not its own. As
many come in. Trees, and switches that add up (NVLS), need less for an all-reduce.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.mesh import Mesh


@dataclass
class Line:
    """One kind of collective over one axis.

    Attributes:
        axis: whose ranks take part.
        ranks: how many they are.
        operation: which collective.
        calls: how often.
        sent: bytes that leave this rank.
        first: of these ranks, among all.
        last: of them.
    """

    axis: str
    ranks: int
    operation: str
    calls: int
    sent: int
    first: int
    last: int


@dataclass(frozen=True)
class Collective:
    """Where an operator of torch.distributed has its group and its data.

    Attributes:
        name: what it is called here.
        group: which argument is the group.
        data: which argument is what this rank gives.
        share: how many times that leaves it, of n ranks: (n − 1) · ``share`` over n where ``cut``, else not over n.
        cut: whether the data is whole, of which a rank keeps its part.
    """

    name: str
    group: int
    data: int
    share: int
    cut: bool


OPERATORS = {
    "c10d::allreduce_": Collective("all-reduce", 1, 0, 2, True),
    "c10d::_allgather_base_": Collective("all-gather", 2, 1, 1, False),
    "c10d::allgather_": Collective("all-gather", 2, 1, 1, False),
    "c10d::_reduce_scatter_base_": Collective("reduce-scatter", 2, 1, 1, True),
    "c10d::reduce_scatter_": Collective("reduce-scatter", 2, 1, 1, True),
    "c10d::alltoall_base_": Collective("all-to-all", 2, 1, 1, True),
    "c10d::alltoall_": Collective("all-to-all", 2, 1, 1, True),
    "c10d::broadcast_": Collective("broadcast", 1, 0, 1, True),
    "c10d::send": Collective("send", 1, 0, 1, False),
    "_c10d_functional::all_reduce": Collective("all-reduce", 2, 0, 2, True),
    "_c10d_functional::all_reduce_": Collective("all-reduce", 2, 0, 2, True),
    "_c10d_functional::all_gather_into_tensor": Collective("all-gather", 2, 0, 1, False),
    "_c10d_functional::reduce_scatter_tensor": Collective("reduce-scatter", 3, 0, 1, True),
    "_c10d_functional::all_to_all_single": Collective("all-to-all", 3, 0, 1, True),
    "_c10d_functional::broadcast": Collective("broadcast", 2, 0, 1, True),
}
RING = {"parallel::ring": 1, "parallel::ring_backward": 2}
"""Operators that send by themselves (parallel/ring.py), and which argument is the keys; values come next."""

SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")
"""Operators that send nothing: what is received was another's to send."""

AXES = ("tp", "cp", "ep", "edp", "dp_shard", "fsdp", "dp_replicate", "pp")
SEVERAL = ("dp", "losses", "shards", "stage")
"""Names of groups (parallel/mesh.py): of one axis, and of several together."""


def names(mesh: Mesh) -> dict[str, str]:
    """What each group is called, by torch's name of it: its axis, or all of them if they have the same ranks.

    Example: without cp, where ep is as large as dp_shard, their group is ep = dp_shard.
    """
    found: dict[str, list[str]] = {}
    for name in (*AXES, *SEVERAL):
        if name in mesh.groups and not (name == "fsdp" and mesh.sizes.cp == 1):  # which is dp_shard then
            found.setdefault(mesh.groups[name].group_name, []).append(name)
    return {group: " = ".join([name for name in each if name in AXES] or each[:1]) for group, each in found.items()}


class Wire(TorchDispatchMode):
    """Notes the collectives that are called in a ``with``."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.names = names(mesh)
        self.lines: dict[tuple[str, str], Line] = {}

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note an operator if it is a collective, and run it."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it becomes on the local tensors comes here again
        self.note(function, args)
        return function(*args, **(kwargs or {}))

    def note(self, function: Any, args: Any) -> None:
        """Count an operator that is called, if it is a collective."""
        if function.namespace not in ("c10d", "_c10d_functional", "parallel"):
            return
        name = function.name().partition(".")[0]
        if name.partition("::")[2] in SILENT:
            return
        if name in RING:
            self._add(_group(args[-3]), "send", *_sent_round(name, args))
            return
        about = OPERATORS[name]
        group = _group(args[about.group])
        ranks = dist.get_process_group_ranks(group)
        self._add(group, about.name, 1, _sent(about, args, ranks=len(ranks), place=dist.get_rank(group)))

    def _add(self, group: dist.ProcessGroup, operation: str, calls: int, sent: int) -> None:
        ranks = dist.get_process_group_ranks(group)
        axis = self.names.get(group.group_name) or group.group_desc.removeprefix("mesh_")
        line = self.lines.setdefault(
            (axis, operation), Line(axis, len(ranks), operation, 0, 0, first=ranks[0], last=ranks[-1])
        )
        line.calls += calls
        line.sent += sent


def _group(given: Any) -> dist.ProcessGroup:
    if isinstance(given, str):  # as functional collectives name it
        return dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(given))
    return dist.ProcessGroup.unbox(given)


def _sent(about: Collective, args: Any, *, ranks: int, place: int) -> int:
    """Bytes that leave this rank."""
    size = sum(x.numel() * x.element_size() for x in tree_leaves(args[about.data]) if isinstance(x, Tensor))
    if about.name == "send":
        return size
    if about.name == "all-to-all":
        splits = next((each for each in reversed(args) if isinstance(each, list | tuple)), [])  # of what is given
        if splits and isinstance(splits[0], int):
            return size - size * splits[place] // max(1, sum(splits))
    return size * (ranks - 1) * about.share // (ranks if about.cut else 1)


def _sent_round(name: str, args: Any) -> tuple[int, int]:
    """Calls and bytes of ring attention on this rank: keys and values go on to all but one, their gradients to all."""
    k, v = args[RING[name] : RING[name] + 2]
    numbers, others = k.numel() + v.numel(), args[-1] - 1
    calls, sent = others, others * numbers * k.element_size()
    if name == "parallel::ring_backward":
        wide = torch.promote_types(k.dtype, torch.float32)
        calls, sent = calls + others + 1, sent + (others + 1) * numbers * wide.itemsize
    return calls, sent


def by_axis(lines: Iterable[Line]) -> dict[str, int]:
    """Bytes sent over each axis."""
    sums: dict[str, int] = defaultdict(int)
    for line in lines:
        sums[line.axis] += line.sent
    return dict(sums)
