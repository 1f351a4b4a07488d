"""What mixes tokens, as data: norms, rotary positions, attention, latent attention, gated DeltaNet."""

import math
from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from zoo.config_check import check, check_above_0, check_finite


class NormKind(StrEnum):
    """How a vector is normalised."""

    rms = "rms"  # arXiv 1910.07467: to a root mean square of one, times a weight
    layer = "layer"  # arXiv 1607.06450: to mean zero and variance one, times a weight, plus a bias (GPT-2, Chameleon)
    bare = "bare"  # as rms, without a weight (queries and keys of Llama 4 Scout)


class Scope(StrEnum):
    """Over what queries and keys are normalised."""

    head = "head"  # each head, one weight for all heads (Qwen3, Gemma 3, GLM-4.5)
    own = "own"  # each head, with a weight of its own (Chameleon)
    width = "width"  # all heads together (OLMo 2)


class Scaling(StrEnum):
    """How rotary frequencies are changed for contexts longer than those trained on."""

    linear = "linear"  # all divided (Gemma 3)
    llama3 = "llama3"  # Llama 3.1, 3.2, Llama 4 Scout
    yarn = "yarn"  # DeepSeek, Kimi K2, gpt-oss, arXiv 2309.00071


class TemperatureKind(StrEnum):
    """How attention sharpens with the position of the query."""

    steps = "steps"  # queries times 1 + scale · ln(1 + ⌊(position + 1) / floor⌋) (Llama 4)
    ratio = "ratio"  # capped scores times log(position) / log(floor) beyond floor (Grok 2.5)


@dataclass
class NormConfig:
    """A normalisation; RMSNorm casts to the input's dtype before the weight multiplies, unless ``late_cast``."""

    eps: float = MISSING
    kind: NormKind = NormKind.rms
    offset: float = 0.0  # of the weight: 1 where the stored weight is a deviation from one (Gemma 3, Qwen3-Next)
    late_cast: bool = False  # the weight multiplies in fp32 (OLMo 2, gpt-oss, Gemma 3, Qwen3-Next)

    def __post_init__(self) -> None:
        check_above_0(self, "norm", "eps")
        check(self.offset in (0.0, 1.0), "norm.offset", self.offset, "0 or 1")
        plain = self.kind is NormKind.rms or not (self.offset or self.late_cast)
        check(plain, "norm.kind", self.kind, f"{NormKind.rms} where offset or late_cast is set")


@dataclass
class QKNormConfig(NormConfig):
    """A normalisation of queries and of keys, each with its own weights."""

    scope: Scope = Scope.head
    after_rope: bool = False  # Llama 4 Scout

    def __post_init__(self) -> None:
        super().__post_init__()
        layered = self.kind is NormKind.layer or self.scope is not Scope.own
        check(layered, "qk_norm.scope", self.scope, f"{Scope.head} or {Scope.width} unless kind is {NormKind.layer}")
        alike = self.kind is NormKind.bare and self.scope is Scope.head  # rotation changes the dimensions' order
        check(
            alike or not self.after_rope,
            "qk_norm.after_rope",
            self.after_rope,
            "false unless kind is bare and scope is head",
        )


@dataclass
class RopeScalingConfig:
    """Scaling of rotary frequencies; which fields count depends on ``kind``."""

    kind: Scaling = MISSING
    factor: float = MISSING
    original_context: int | None = None  # llama3, yarn
    low: float | None = None  # llama3: low_freq_factor; yarn: beta_slow
    high: float | None = None  # llama3: high_freq_factor; yarn: beta_fast
    mscale: float = 1.0  # yarn, of the phases, divided by that of mscale_all_dim
    mscale_all_dim: float = 1.0  # yarn, of the softmax scale (DeepSeek); 0: the phases carry all of it (gpt-oss)
    truncate: bool = True  # yarn: the bounds of the blend are whole pairs; not for gpt-oss

    def __post_init__(self) -> None:
        check(1 <= self.factor < math.inf, "rope.scaling.factor", self.factor, "at least 1")
        check_above_0(self, "rope.scaling", "original_context", "low", "high")
        check_finite(self, "rope.scaling", "mscale", "mscale_all_dim")
        for key in ("original_context", "low", "high"):
            needed, given = self.kind is not Scaling.linear, getattr(self, key)
            check(
                needed == (given is not None),
                f"rope.scaling.{key}",
                given,
                f"set for llama3 and yarn, kind={self.kind}",
            )
        if self.low is not None and self.high is not None:
            check(self.low <= self.high, "rope.scaling.low", self.low, f"at most high ({self.high})")


@dataclass
class RopeConfig:
    """Rotary positions, arXiv 2104.09864."""

    theta: float = MISSING
    interleaved: bool = False  # pairs are neighbours (DeepSeek, Llama 4), not halves apart
    fraction: float = 1.0  # of a head's dimensions, the first ones, that turn (GLM-4.5 0.5, Qwen3-Next 0.25)
    scaling: RopeScalingConfig | None = None

    def __post_init__(self) -> None:
        check_above_0(self, "rope", "theta")
        check(0 < self.fraction <= 1, "rope.fraction", self.fraction, "above 0 and at most 1")

    def turning(self, dim: int) -> int:
        """How many of the ``dim`` dimensions of a head turn."""
        return int(dim * self.fraction)


@dataclass
class TemperatureConfig:
    """Attention that sharpens with the position of the query, counted from 0 in its document."""

    kind: TemperatureKind = MISSING
    floor: int = MISSING  # positions up to here keep their scores
    scale: float = 1.0  # steps: of the logarithm

    def __post_init__(self) -> None:
        check_above_0(self, "attention.temperature", "scale")
        check(self.floor > 1, "attention.temperature.floor", self.floor, "above 1")


@dataclass
class AttentionConfig:
    """Grouped-query attention, arXiv 2305.13245."""

    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    head_dim: int = MISSING
    rope: RopeConfig | None = None  # None: no rotary positions in this layer (SmolLM3, Llama 4, GPT-2)
    qk_norm: QKNormConfig | None = None
    bias: bool = False  # of queries, keys and values (GPT-2, gpt-oss, GLM-4.5)
    out_bias: bool = False  # of the output (GPT-2, gpt-oss)
    window: int | None = None  # keys a query sees, itself included (Mistral 7B, Gemma 3, gpt-oss)
    chunk: int | None = None  # positions p and r see each other if p // chunk == r // chunk (Llama 4)
    scale_dim: float | None = None  # scores are divided by its root; None: head_dim (Gemma 3)
    softcap: float | None = None  # scores become softcap · tanh(scores / softcap) (Grok 2.5)
    sinks: bool = False  # one more logit a head, learned, in the softmax's denominator only (gpt-oss)
    gate: bool = False  # the output times a sigmoid of the input (Qwen3-Next)
    temperature: TemperatureConfig | None = None  # Llama 4, Grok 2.5

    def __post_init__(self) -> None:
        check_above_0(self, "attention", "n_heads", "n_kv_heads", "head_dim", "window", "chunk", "scale_dim", "softcap")
        divides = self.n_heads % self.n_kv_heads == 0
        check(divides, "attention.n_kv_heads", self.n_kv_heads, f"a divisor of n_heads ({self.n_heads})")
        check(not (self.window and self.chunk), "attention.window", self.window, "null where chunk is set")
        if self.rope is not None:
            turning = self.rope.turning(self.head_dim)
            check(turning > 0 and turning % 2 == 0, "attention.head_dim", self.head_dim, "even, for rotation in pairs")
            s = self.rope.scaling
            phases = s is None or s.kind is not Scaling.yarn or s.mscale_all_dim == 0
            check(
                phases,
                "attention.rope.scaling.mscale_all_dim",
                s and s.mscale_all_dim,
                "0: only the scores of mla are scaled by it",
            )

    @property
    def scale(self) -> float:
        """What multiplies the scores."""
        return float(self.scale_dim or self.head_dim) ** -0.5


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
        check_above_0(self, "mla", "n_heads", "q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim")
        check(self.rope_dim % 2 == 0, "mla.rope_dim", self.rope_dim, "even, for rotation in pairs")
        check(self.rope.fraction == 1, "mla.rope.fraction", self.rope.fraction, "1: nope_dim is what does not turn")


@dataclass
class DeltaNetConfig:
    """Gated DeltaNet, arXiv 2412.06464, as Qwen3-Next has it: value heads in groups that share a key head."""

    n_k_heads: int = MISSING
    n_v_heads: int = MISSING
    k_dim: int = MISSING
    v_dim: int = MISSING
    conv: int = MISSING  # positions that the causal convolution reaches, its own included
    norm: NormConfig = MISSING  # of each value head, before the gate

    def __post_init__(self) -> None:
        check_above_0(self, "deltanet", "n_k_heads", "n_v_heads", "k_dim", "v_dim", "conv")
        divides = self.n_v_heads % self.n_k_heads == 0
        check(divides, "deltanet.n_k_heads", self.n_k_heads, f"a divisor of n_v_heads ({self.n_v_heads})")
