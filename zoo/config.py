"""What an architecture is, as data. A part that may be absent is a slot (``Config | None``), never a flag."""

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

FAMILIES = ("deepseek_v3", "llama3", "qwen3")
"""What ``model.family`` may be: the names that zoo/hf_config.py knows a class of transformers for."""


class Scaling(StrEnum):
    """How rotary frequencies are changed for contexts longer than those trained on."""

    llama3 = "llama3"  # Llama 3.1, 3.2
    yarn = "yarn"  # DeepSeek-V3, arXiv 2309.00071


@dataclass
class NormConfig:
    """RMSNorm: the input is normalised, cast to its own dtype, then multiplied by the weight."""

    eps: float = MISSING

    def __post_init__(self) -> None:
        check_above_0(self, "norm", "eps")


@dataclass
class RopeScalingConfig:
    """Scaling of rotary frequencies; which fields count depends on ``kind``."""

    kind: Scaling = MISSING
    factor: float = MISSING
    original_context: int = MISSING
    low: float = MISSING  # llama3: low_freq_factor; yarn: beta_slow
    high: float = MISSING  # llama3: high_freq_factor; yarn: beta_fast
    mscale: float = 1.0  # yarn, of the phases, divided by that of mscale_all_dim
    mscale_all_dim: float = 1.0  # yarn, of the softmax scale (DeepSeek-V3)

    def __post_init__(self) -> None:
        check(1 <= self.factor < math.inf, "rope.scaling.factor", self.factor, "at least 1")
        check_above_0(self, "rope.scaling", "original_context", "low", "high")
        check_finite(self, "rope.scaling", "mscale", "mscale_all_dim")
        check(self.low <= self.high, "rope.scaling.low", self.low, f"at most high ({self.high})")


@dataclass
class RopeConfig:
    """Rotary positions, arXiv 2104.09864."""

    theta: float = MISSING
    interleaved: bool = False  # pairs are neighbours (DeepSeek-V3), not halves apart
    scaling: RopeScalingConfig | None = None

    def __post_init__(self) -> None:
        check_above_0(self, "rope", "theta")


@dataclass
class AttentionConfig:
    """Grouped-query attention."""

    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    head_dim: int = MISSING
    rope: RopeConfig = MISSING
    qk_norm: NormConfig | None = None  # per head, before rotation (Qwen3)

    def __post_init__(self) -> None:
        check_above_0(self, "attention", "n_heads", "n_kv_heads", "head_dim")
        check(
            self.n_heads % self.n_kv_heads == 0,
            "attention.n_kv_heads",
            self.n_kv_heads,
            f"a divisor of n_heads ({self.n_heads})",
        )
        check(self.head_dim % 2 == 0, "attention.head_dim", self.head_dim, "even, for rotation in pairs")


@dataclass
class MLAConfig:
    """Multi-head latent attention, arXiv 2405.04434, section 2.1."""

    n_heads: int = MISSING
    q_rank: int | None = MISSING  # null: queries come straight from the model width
    kv_rank: int = MISSING
    nope_dim: int = MISSING
    rope_dim: int = MISSING
    v_dim: int = MISSING
    norm: NormConfig = MISSING  # of both latents; its eps need not be the model's
    rope: RopeConfig = MISSING

    def __post_init__(self) -> None:
        ranks = ("kv_rank",) if self.q_rank is None else ("q_rank", "kv_rank")
        check_above_0(self, "mla", "n_heads", *ranks, "nope_dim", "rope_dim", "v_dim")
        check(self.rope_dim % 2 == 0, "mla.rope_dim", self.rope_dim, "even, for rotation in pairs")


@dataclass
class MLPConfig:
    """SwiGLU feed-forward, arXiv 2002.05202."""

    d_ff: int = MISSING

    def __post_init__(self) -> None:
        check_above_0(self, "mlp", "d_ff")


@dataclass
class RouterConfig:
    """Sigmoid router with groups and aux-loss-free balancing, arXiv 2412.19437, section 2.1.2."""

    scale: float = MISSING  # of the chosen, normalised scores
    n_groups: int = MISSING
    top_groups: int = MISSING  # groups from which a token may choose
    balance_rate: float = MISSING  # step of the balancing bias at each update; 0 keeps it still
    balance_loss: float = MISSING  # weight of the sequence-wise balance loss; 0: none

    def __post_init__(self) -> None:
        check_above_0(self, "router", "scale", "n_groups", "top_groups")
        check(
            self.top_groups <= self.n_groups,
            "router.top_groups",
            self.top_groups,
            f"1 to n_groups ({self.n_groups})",
        )
        for key in ("balance_rate", "balance_loss"):
            check(0 <= getattr(self, key) < math.inf, f"router.{key}", getattr(self, key), "0 or more, and finite")


@dataclass
class MoEConfig:
    """Routed experts beside one shared expert of width ``d_shared``, which 0 leaves out."""

    n_experts: int = MISSING
    top_k: int = MISSING
    d_expert: int = MISSING
    d_shared: int = MISSING
    router: RouterConfig = MISSING

    def __post_init__(self) -> None:
        check_above_0(self, "moe", "n_experts", "top_k", "d_expert")
        check(self.d_shared >= 0, "moe.d_shared", self.d_shared, "0 or more")
        r = self.router
        check(
            self.n_experts % r.n_groups == 0,
            "router.n_groups",
            r.n_groups,
            f"a divisor of n_experts ({self.n_experts})",
        )
        check(
            self.n_experts // r.n_groups >= 2,
            "router.n_groups",
            r.n_groups,
            "groups of two experts or more: a group's score is the sum of its best two",
        )
        reachable = self.n_experts // r.n_groups * r.top_groups
        check(self.top_k <= reachable, "moe.top_k", self.top_k, f"1 to {reachable}, the experts of top_groups groups")


@dataclass
class BlockConfig:
    """One layer: one mixer, then an mlp or a moe."""

    attention: AttentionConfig | None = None
    mla: MLAConfig | None = None
    mlp: MLPConfig | None = None
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        mixers = [name for name in ("attention", "mla") if getattr(self, name) is not None]
        check(len(mixers) == 1, "blocks.*", mixers or "no mixer", "exactly one of attention, mla")
        parts = [name for name in ("mlp", "moe") if getattr(self, name) is not None]
        check(len(parts) == 1, "blocks.*", parts or "no feed-forward", "exactly one of mlp, moe")


@dataclass
class ModelConfig:
    """An architecture: kinds of layer, the order they come in, and what stands before and after them."""

    family: str = MISSING  # read by zoo/hf.py only
    d_model: int = MISSING
    n_layers: int = MISSING
    vocab_size: int = MISSING
    context: int = MISSING  # tokens the model is configured for; YaRN acts only beyond its original_context
    blocks: dict[str, BlockConfig] = MISSING
    prefix: list[str] = field(default_factory=list)  # kinds of the first layers
    cycle: list[str] = MISSING  # kinds of the others, repeated
    norm: NormConfig = MISSING
    tied: bool = False  # embedding and head are one matrix
    n_mtp: int = 0  # modules of multi-token prediction
    init_std: float = MISSING  # of every matrix

    def __post_init__(self) -> None:
        check(self.family in FAMILIES, "model.family", self.family, f"one of {', '.join(FAMILIES)}")
        check_above_0(self, "model", "d_model", "n_layers", "vocab_size", "context", "init_std")
        check(bool(self.cycle), "model.cycle", self.cycle, "at least one kind of layer")
        for key in ("prefix", "cycle"):
            for name in getattr(self, key):
                check(name in self.blocks, f"model.{key}", name, f"one of {sorted(self.blocks)}")
        check(
            len(self.prefix) <= self.n_layers, "model.prefix", self.prefix, f"at most n_layers ({self.n_layers}) names"
        )
        check(self.n_mtp >= 0, "model.n_mtp", self.n_mtp, "0 or more")

    @property
    def kinds(self) -> list[str]:
        """Name of the kind of every layer.

        Example: prefix [a], cycle [b, c], five layers: a b c b c.
        """
        rest = self.n_layers - len(self.prefix)
        repeated = self.cycle * (rest // len(self.cycle) + 1)
        return [*self.prefix, *repeated[:rest]]

    @property
    def layers(self) -> list[BlockConfig]:
        """Config of every layer, in order."""
        return [self.blocks[kind] for kind in self.kinds]


def expanded(config: ModelConfig) -> dict[str, Any]:
    """A model as plain data with ``layers``, its layers in order, instead of kinds: their names mean nothing."""
    plain = asdict(config)
    for key in ("blocks", "prefix", "cycle"):
        del plain[key]
    return plain | {"layers": [asdict(layer) for layer in config.layers]}


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise the one-line ``ValueError`` of a value that a user can correct."""
    if not holds:
        raise ValueError(f"{key}={value}: must be {allowed}")


def check_above_0(part: object, section: str, *keys: str) -> None:
    """``check`` that values of a part's fields are above 0 and finite."""
    for key in keys:
        check(getattr(part, key) > 0, f"{section}.{key}", getattr(part, key), "above 0")
    check_finite(part, section, *keys)


def check_finite(part: object, section: str, *keys: str) -> None:
    """``check`` that values of a part's fields are neither infinite nor NaN."""
    for key in keys:
        check(math.isfinite(getattr(part, key)), f"{section}.{key}", getattr(part, key), "finite")
