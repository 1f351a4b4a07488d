"""What a row of the table of families consists of, and the pieces that rows share."""

from dataclasses import dataclass, field
from typing import Any

from zoo.config_ff import MLPConfig, MoEConfig, RouterConfig, Score
from zoo.config_mixer import AttentionConfig, MLAConfig, NormConfig, QKNormConfig, RopeConfig
from zoo.hf_layers import DENSE, FULL, Alike, Pattern
from zoo.hf_names import LLAMA, Names
from zoo.hf_rules import Heads, Rule
from zoo.hf_table import Part


@dataclass(frozen=True)
class Family:
    """An architecture as transformers names it.

    Attributes:
        name: ours.
        model_type: theirs, what ``config.json`` says.
        architecture: their class that computes logits.
        mixers: parts by the names that the rule ``kinds`` gives to layers.
        feeds: the same for ``feed_kinds``.
        kinds: which layer has which mixer.
        feed_kinds: which has which feed-forward.
        fields: path in a part, or in the model, to field.
        rules: for fields that are no plain counterpart of one value.
        absent: what the class takes a missing field for.
        fixed: fields that the zoo builds with one value only, which is also what their absence means.
        extra: fields to write that say nothing of the model here, and are not looked at.
        norm: of the model, and of every layer.
        model: traits of the model.
        block: traits of every layer.
        names: of tensors.
    """

    name: str
    model_type: str
    architecture: str
    mixers: dict[str, Part]
    feeds: dict[str, Part]
    kinds: Pattern = Alike(FULL)
    feed_kinds: Pattern = Alike(DENSE)
    fields: dict[str, str] = field(default_factory=dict)
    rules: tuple[Rule, ...] = (Heads(),)
    absent: dict[str, object] = field(default_factory=dict)
    fixed: dict[str, object] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    norm: NormConfig = field(default_factory=lambda: NormConfig(eps=1.0))
    model: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)
    names: Names = LLAMA

    @property
    def local_rope(self) -> bool:
        """Whether windowed layers have rotary fields of their own."""
        return "rope_local_base_freq" in self.absent


MODEL = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "norm.eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "init.std": "initializer_range",
}
DENSE_FIELDS = MODEL | {"mlp.d_ff": "intermediate_size"}
QK_NORM = {"attention.qk_norm.eps": "rms_norm_eps"}
WINDOW = {"attention.window": "sliding_window"}
QWEN_MOE = {
    "moe.top_k": "num_experts_per_tok",
    "moe.d_expert": "moe_intermediate_size",
    "moe.router.normalize": "norm_topk_prob",
}
DEEPSEEK_MOE = QWEN_MOE | {"moe.n_experts": "n_routed_experts", "moe.router.scale": "routed_scaling_factor"}
GROUPS = {"moe.router.n_groups": "n_group", "moe.router.top_groups": "topk_group"}
LOCAL_MOE = {
    "moe.n_experts": "num_local_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.d_expert": "intermediate_size",
}
LATENT = {
    "mla.q_rank?": "q_lora_rank",
    "mla.kv_rank": "kv_lora_rank",
    "mla.nope_dim": "qk_nope_head_dim",
    "mla.rope_dim": "qk_rope_head_dim",
    "mla.v_dim": "v_head_dim",
}
DELTA = {
    "deltanet.n_k_heads": "linear_num_key_heads",
    "deltanet.n_v_heads": "linear_num_value_heads",
    "deltanet.k_dim": "linear_key_head_dim",
    "deltanet.v_dim": "linear_value_head_dim",
    "deltanet.conv": "linear_conv_kernel_dim",
    "deltanet.norm.eps": "rms_norm_eps",
}

ABSENT: dict[str, object] = {"tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10_000.0}
TIED = ABSENT | {"tie_word_embeddings": True}
SILU: dict[str, object] = {"hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None}
UNBIASED = SILU | {"attention_bias": False}
UNBIASED_MLP = UNBIASED | {"mlp_bias": False}
UNWINDOWED: dict[str, object] = {"use_sliding_window": False}
EVERY_LAYER: dict[str, object] = {"decoder_sparse_step": 1, "mlp_only_layers": []}

LATENT_EPS = 1e-6
"""Of MLA's two inner norms: transformers' DeepSeek classes keep their norm's default, whatever rms_norm_eps says."""


def attention(*, interleaved: bool = False, fraction: float = 1.0, rope: bool = True, **traits: Any) -> AttentionConfig:
    """Attention with a family's traits, whose sizes are still to be read."""
    turns = RopeConfig(theta=1, interleaved=interleaved, fraction=fraction) if rope else None
    return AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=8, rope=turns, **traits)


def latent() -> MLAConfig:
    """MLA, the same way."""
    turns = RopeConfig(theta=1, interleaved=True)
    return MLAConfig(
        n_heads=1, q_rank=1, kv_rank=1, nope_dim=1, rope_dim=2, v_dim=1, norm=NormConfig(eps=LATENT_EPS), rope=turns
    )


def experts(
    score: Score, *, normalize: bool, router: dict[str, Any] | None = None, d_shared: int = 0, **traits: Any
) -> MoEConfig:
    """Experts, the same way; ``router`` are further traits of the router."""
    chooses = RouterConfig(score=score, normalize=normalize, scale=1.0, **router or {})
    return MoEConfig(n_experts=2, top_k=1, d_expert=1, d_shared=d_shared, router=chooses, **traits)


SWIGLU = MLPConfig(d_ff=1)
DEVIATIONS = NormConfig(eps=1.0, offset=1.0, late_cast=True)  # norm weights that are stored less one
QK_DEVIATIONS = QKNormConfig(eps=1.0, offset=1.0, late_cast=True)
