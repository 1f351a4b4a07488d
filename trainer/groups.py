"""Which optimizer each parameter gets: by its name, shape and architecture alone, the same under every plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from parallel.owners import Matrix
from parallel.plan import key, layer_of
from trainer.config import OptimConfig, OptimKind
from trainer.config_groups import Role
from zoo.config import ModelConfig

ROLES: list[tuple[str, Role]] = [
    ("embed.weight", Role.embedding),
    ("positions.weight", Role.embedding),
    ("head.weight", Role.head),
    ("*norm.*", Role.norm),
    ("*bias", Role.bias),
    ("attention.sinks", Role.vector),
    ("deltanet.log_decay", Role.vector),
    ("moe.shared_gate.weight", Role.vector),
    ("deltanet.conv_*.weight", Role.filter),
    ("attention.w[qkvgo].weight", Role.matrix),
    ("mla.w*.weight", Role.matrix),
    ("deltanet.w[qkvgbao].weight", Role.matrix),
    ("mlp.*.weight", Role.matrix),
    ("moe.shared.*.weight", Role.matrix),
    ("moe.router.weight", Role.matrix),
    ("moe.experts.*", Role.matrix),
    ("mtp.proj.weight", Role.matrix),
]
"""Patterns of names as ``parallel.plan.key`` makes them; the first that matches counts."""


@dataclass(frozen=True)
class Group:
    """What an optimizer does alike.

    Attributes:
        optimizer: which.
        role: of the parameters.
        decays: whether weights shrink.
    """

    optimizer: OptimKind
    role: Role
    decays: bool


def role(name: str, *, config: ModelConfig) -> Role:
    """What a parameter is; every parameter of every architecture is something."""
    called = key(name, config=config)
    found = next((role for pattern, role in ROLES if fnmatchcase(called, pattern)), None)
    assert found is not None, f"{name=} {called=}"
    return found


def group(
    name: str,
    shape: Sequence[int],
    *,
    config: ModelConfig,
    kind: OptimKind,
    no_decay: Sequence[Role] | None = None,
) -> Group:
    """The group of a parameter.

    Muon is for matrices, which map one space to another; embeddings and heads map tokens, and with norms, biases and
    vectors they get AdamW (arXiv 2502.16982, section 2; GLM-4.5, arXiv 2508.06471). Without ``no_decay`` what has two
    dimensions or more decays, biases of experts, which are a row each, among it; vectors do not. With it all decays
    but those roles. One matrix that is embedding and head is an embedding.
    """
    what = role(name, config=config)
    muon = kind.is_muon and what is Role.matrix
    decays = len(shape) >= 2 if no_decay is None else what not in no_decay
    return Group(OptimKind.muon if muon else OptimKind.adamw, what, decays)


def matrices(name: str, shape: Sequence[int], *, config: ModelConfig) -> list[Matrix]:
    """The logical weights inside a parameter that is a matrix, or a bank of them.

    - Each expert of a bank is one.
    - Latent attention fuses products only to compute them at once. They are split as arXiv 2405.04434, section 2.1
      names them, since the singular values of one say nothing of the other's: ``wkv``, each head's keys then values,
      into W^UK and W^UV; ``wkv_down`` into W^DKV and W^KR; ``wq``, each head's part without position then the rotated
      one, into W^UQ and W^QR.
    - All else is one already: ``wq wk wv wg gate up`` are parameters of their own in every family.

    Args:
        name: of the parameter.
        shape: of it as a whole.
        config: of the model.
    """
    of = tuple(shape)
    if len(of) == 3:
        return [Matrix(name, of, expert, period=of[1], first=0, width=of[1]) for expert in range(of[0])]
    parts = _fused(name, config) or (of[0],)
    firsts = [sum(parts[:i]) for i in range(len(parts))]
    return [Matrix(name, of, None, sum(parts), first, width) for first, width in zip(firsts, parts, strict=True)]


def _fused(name: str, config: ModelConfig) -> tuple[int, int] | None:
    """Rows of each head that belong to each of two matrices; None for what is one."""
    called = key(name, config=config)
    if not called.startswith("mla."):
        return None
    mla = layer_of(name, config).mla
    assert mla is not None, f"{name=}"
    return {
        "mla.wq.weight": (mla.nope_dim, mla.rope_dim),
        "mla.wkv.weight": (mla.nope_dim, mla.v_dim),
        "mla.wkv_down.weight": (mla.kv_rank, mla.rope_dim),
    }.get(called)


@dataclass(frozen=True)
class Line:
    """One row of the table of groups.

    Attributes:
        group: whose.
        tensors: parameters in it.
        matrices: logical weights that are orthogonalised; 0 under AdamW.
        numbers: in all of them.
        lr: highest.
        weight_decay: a step takes lr times this off.
    """

    group: Group
    tensors: int
    matrices: int
    numbers: int
    lr: float
    weight_decay: float


def table(shapes: Mapping[str, Sequence[int]], *, config: ModelConfig, optim: OptimConfig) -> list[Line]:
    """What gets which optimizer, of the parameters of a whole model, in the order of roles."""
    members: dict[Group, list[str]] = {}
    for name, shape in shapes.items():
        found = group(name, shape, config=config, kind=optim.kind, no_decay=optim.no_decay)
        members.setdefault(found, []).append(name)
    lines = []
    for each in sorted(members, key=lambda each: (list(Role).index(each.role), not each.decays)):
        names = members[each]
        muon = each.optimizer is OptimKind.muon
        lines.append(
            Line(
                each,
                tensors=len(names),
                matrices=sum(len(matrices(name, shapes[name], config=config)) for name in names) if muon else 0,
                numbers=sum(_numel(shapes[name]) for name in names),
                lr=optim.lr,
                weight_decay=optim.weight_decay if each.decays else 0.0,
            )
        )
    return lines


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def rendered(lines: Sequence[Line]) -> str:
    """The table as text, columns aligned."""
    head = ("parameters", "tensors", "numbers", "optimizer", "matrices", "lr", "weight decay")
    rows = [
        (str(line.group.role), f"{line.tensors:,}", f"{line.numbers:,}", str(line.group.optimizer))
        + (f"{line.matrices:,}" if line.matrices else "-", f"{line.lr:g}", f"{line.weight_decay:g}")
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    left = (0, 3)
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )
