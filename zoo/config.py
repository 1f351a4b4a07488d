"""What an architecture is, as data. A part that may be absent is a slot (``Config | None``), never a flag."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from zoo.config_check import check, check_above_0
from zoo.config_ff import MLPConfig, MoEConfig
from zoo.config_mixer import AttentionConfig, DeltaNetConfig, MLAConfig, NormConfig


@dataclass
class InitConfig:
    """Initial values of matrices: normal around zero. Norms start neutral and biases at zero."""

    std: float = MISSING
    scale_residual: bool = False  # what adds to the residual stream: std / √(2 n_layers) (GPT-2)
    cutoff: float | None = None  # in standard deviations, beyond which values are drawn again (OLMo 2)

    def __post_init__(self) -> None:
        check_above_0(self, "init", "std", "cutoff")


@dataclass
class BlockConfig:
    """One layer: one mixer; an mlp, a moe, or both side by side (Grok 2.5), whose sum is scaled by ``ff_scale``."""

    attention: AttentionConfig | None = None
    mla: MLAConfig | None = None
    deltanet: DeltaNetConfig | None = None
    mlp: MLPConfig | None = None
    moe: MoEConfig | None = None
    pre_norm: bool = True  # what goes into mixer and feed-forward is normalised; not in OLMo 2
    post_norm: bool = False  # what comes out is, before it is added (OLMo 2, Gemma 3, Grok 2.5)
    ff_scale: float = 1.0  # Grok 2.5: 1/√2

    def __post_init__(self) -> None:
        mixers = [name for name in ("attention", "mla", "deltanet") if getattr(self, name) is not None]
        check(len(mixers) == 1, "blocks.*", mixers or "no mixer", "exactly one of attention, mla, deltanet")
        parts = [name for name in ("mlp", "moe") if getattr(self, name) is not None]
        check(bool(parts), "blocks.*", "no feed-forward", "mlp, moe or both")
        check_above_0(self, "blocks.*", "ff_scale")


@dataclass
class ModelConfig:
    """An architecture: kinds of layer, the order they come in, and what stands before and after them."""

    family: str = MISSING  # read by zoo/hf.py only: which class of transformers holds it
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
    init: InitConfig = MISSING
    learned_positions: bool = False  # one vector a position of the context, added to the embedding (GPT-2)
    scale_embed: bool = False  # embeddings times √d_model, rounded to their dtype (Gemma 3, Grok 2.5)
    logit_scale: float = 1.0  # Grok 2.5
    logit_softcap: float | None = None  # logits become softcap · tanh(logits / softcap) (Grok 2.5)

    def __post_init__(self) -> None:
        check(self.family.isidentifier(), "model.family", self.family, "a name of letters, digits and _")
        sizes = ("d_model", "n_layers", "vocab_size", "context", "logit_scale", "logit_softcap")
        check_above_0(self, "model", *sizes)
        check(bool(self.cycle), "model.cycle", self.cycle, "at least one kind of layer")
        for key in ("prefix", "cycle"):
            for name in getattr(self, key):
                check(name in self.blocks, f"model.{key}", name, f"one of {sorted(self.blocks)}")
        fits = len(self.prefix) <= self.n_layers
        check(fits, "model.prefix", self.prefix, f"at most n_layers ({self.n_layers}) names")
        banks = {layer.moe.n_experts for layer in self.layers if layer.moe is not None}
        check(
            len(banks) <= 1, "moe.n_experts", sorted(banks), "the same number in all layers: their loads are compared"
        )
        check(self.n_mtp >= 0, "model.n_mtp", self.n_mtp, "0 or more")
        check(
            not (self.n_mtp and self.learned_positions),
            "model.n_mtp",
            self.n_mtp,
            "0 with learned_positions: a shift by one position must change nothing but the tokens",
        )

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
