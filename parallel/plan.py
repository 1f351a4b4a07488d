"""Which parameters are shared under tensor parallelism, and along which dimension: one table for every architecture.

A product whose columns are shared (Megatron-LM's word, arXiv 1909.08053; a weight is (d_out, d_in), so it is dim 0)
gives each rank some heads or hidden units; one whose rows are shared takes them and gives partial sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from zoo.config import BlockConfig, ModelConfig


class Kind(StrEnum):
    """How a parameter is shared."""

    column = "column"  # what it gives is shared: heads, hidden units
    row = "row"  # what it takes is shared, what it gives is a partial sum
    vocab = "vocab"  # rows of the vocabulary
    expert = "expert"  # something of each routed expert: expert parallelism cuts dim 0, tensor parallelism one inside
    whole = "whole"  # every rank has all of it, and a partial gradient


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        pattern: of keys as ``key`` makes them, with ``*``.
        kind: how it is shared.
        dim: which dimension is cut; None: none.
        kv: whether it belongs to key-value heads, of which there may be fewer than ranks.
    """

    pattern: str
    kind: Kind
    dim: int | None
    kv: bool = False


def _column(*patterns: str, kv: bool = False) -> list[Row]:
    return [Row(pattern, Kind.column, 0, kv) for pattern in patterns]


def _row(*patterns: str) -> list[Row]:
    return [Row(pattern, Kind.row, 1) for pattern in patterns]


def _expert(*patterns: str, dim: int | None) -> list[Row]:
    return [Row(pattern, Kind.expert, dim) for pattern in patterns]


def _whole(*patterns: str) -> list[Row]:
    return [Row(pattern, Kind.whole, None) for pattern in patterns]


TABLE: list[Row] = [
    Row("embed.weight", Kind.vocab, 0),
    Row("head.weight", Kind.vocab, 0),
    *_whole("positions.weight", "norm.*", "mixer_norm.*", "mixer_post_norm.*", "ff_norm.*", "ff_post_norm.*"),
    *_whole("mtp.embed_norm.*", "mtp.hidden_norm.*", "mtp.proj.weight", "mtp.norm.*"),
    *_column("attention.wq.*", "attention.wg.weight", "attention.sinks"),
    *_column("attention.wk.*", "attention.wv.*", kv=True),
    *_column("attention.q_norm.own.*", "attention.q_norm.width.*"),
    *_column("attention.k_norm.own.*", "attention.k_norm.width.*", kv=True),
    *_whole("attention.q_norm.head.*", "attention.k_norm.head.*", "attention.wo.bias"),
    *_column("mla.wq.weight", "mla.wkv.weight"),
    *_whole("mla.wq_down.weight", "mla.wkv_down.weight", "mla.q_norm.*", "mla.kv_norm.*"),
    *_column("deltanet.w[qkvgba].weight", "deltanet.conv_*.weight", "deltanet.log_decay", "deltanet.dt_bias"),
    *_whole("deltanet.norm.*"),
    *_row("attention.wo.weight", "mla.wo.weight", "deltanet.wo.weight"),
    *_column("mlp.gate.*", "mlp.up.*", "moe.shared.gate.*", "moe.shared.up.*"),
    *_row("mlp.down.weight", "moe.shared.down.weight"),
    *_whole("mlp.down.bias", "moe.shared.down.bias", "moe.shared_gate.weight", "moe.router.*"),
    *_expert("moe.experts.gate", "moe.experts.up", "moe.experts.gate_bias", "moe.experts.up_bias", dim=1),
    *_expert("moe.experts.down", dim=2),
    *_expert("moe.experts.down_bias", dim=None),
]


@dataclass(frozen=True)
class Share:
    """Which part of a parameter a rank of the axis has: one of several pieces, of each of which there may be copies.

    Ranks with copies of a piece are neighbours. A whole parameter is one piece.

    Example: two key heads over four ranks are two pieces in two copies: ranks 0 and 1 have head 0, 2 and 3 head 1.

    Attributes:
        dim: which dimension is cut; None: none.
        n: size of the whole along it.
        pieces: into how many.
        copies: of each piece.
        rank: of the axis.
    """

    dim: int | None
    n: int
    pieces: int
    copies: int
    rank: int

    @property
    def first(self) -> bool:
        """Whether this rank's is the copy that counts where pieces are added up."""
        return self.rank % self.copies == 0

    @property
    def part(self) -> slice:
        """Where this rank's piece lies along ``dim``: all are as large as the first, but for the last ones.

        Example: 5 in 2 pieces are 0:3 and 3:5.
        """
        size = -(-self.n // self.pieces)
        start = min(self.rank // self.copies * size, self.n)
        return slice(start, min(start + size, self.n))

    def whole(self, piece: Sequence[int]) -> list[int]:
        """Shape of the whole, from that of this rank's piece."""
        return [self.n if dim == self.dim else size for dim, size in enumerate(piece)]


def share(name: str, shape: Sequence[int], *, config: ModelConfig, size: int, rank: int) -> Share:
    """What rank ``rank`` of ``size`` has of the parameter ``name``, which as a whole has this shape."""
    row = find(name, config=config)
    if row.dim is None:
        return Share(None, n=0, pieces=1, copies=size, rank=rank)
    pieces = size
    if row.kv:
        attention = layer_of(name, config).attention
        assert attention is not None, f"{name=}"
        pieces = min(size, attention.n_kv_heads)
    assert size % pieces == 0, f"{name=} {size=} {pieces=}"
    return Share(row.dim, n=shape[row.dim], pieces=pieces, copies=size // pieces, rank=rank)


def find(name: str, *, config: ModelConfig) -> Row:
    """The one row of the table that a parameter matches."""
    found = [row for row in TABLE if fnmatchcase(key(name, config=config), row.pattern)]
    assert len(found) == 1, f"{name=} {key(name, config=config)=} {found=}"
    return found[0]


def key(name: str, *, config: ModelConfig) -> str:
    """What the table calls a parameter: without its layer, its mixer and the scope of its norm by what they are.

    Example: blocks.3.mixer.q_norm.weight is attention.q_norm.head.weight in Qwen3 and mla.q_norm.weight in DeepSeek-V3;
    mtp.0.block.moe.experts.up is moe.experts.up, mtp.0.proj.weight is mtp.proj.weight.
    """
    parts = name.split(".")
    if parts[:1] == ["mtp"]:
        parts = parts[3:] if parts[2] == "block" else ["mtp", *parts[2:]]
    elif parts[0] == "blocks":
        parts = parts[2:]
    if parts[0] == "mixer":
        layer = layer_of(name, config)
        kinds = {"attention": layer.attention, "mla": layer.mla, "deltanet": layer.deltanet}
        parts[0] = next(kind for kind, part in kinds.items() if part is not None)
        if layer.attention is not None and parts[1] in ("q_norm", "k_norm"):
            assert layer.attention.qk_norm is not None, f"{name=}"
            parts.insert(2, layer.attention.qk_norm.scope)
    return ".".join(parts)


def layer_of(name: str, config: ModelConfig) -> BlockConfig:
    """Config of the layer that a parameter belongs to; a module of multi-token prediction is as the last one."""
    place, number, *_ = name.split(".")
    return config.layers[int(number) if place == "blocks" else -1]
