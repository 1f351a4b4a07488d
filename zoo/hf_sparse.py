"""Families with experts that transformers 5.23 has classes for, one row each; see ``hf_family.Family``."""

from zoo import hf_names
from zoo.config_ff import Activation, GroupScore, Score
from zoo.config_mixer import (
    DeltaNetConfig,
    NormConfig,
    NormKind,
    QKNormConfig,
    TemperatureConfig,
    TemperatureKind,
)
from zoo.hf_family import (
    ABSENT,
    DEEPSEEK_MOE,
    DELTA,
    DENSE_FIELDS,
    DEVIATIONS,
    EVERY_LAYER,
    GROUPS,
    LATENT,
    LOCAL_MOE,
    MODEL,
    QK_DEVIATIONS,
    QK_NORM,
    QWEN_MOE,
    SILU,
    SWIGLU,
    UNBIASED,
    UNBIASED_MLP,
    UNWINDOWED,
    WINDOW,
    Family,
    attention,
    experts,
    latent,
)
from zoo.hf_layers import (
    CHUNKED,
    DENSE,
    FULL,
    LINEAR,
    MOE,
    NOPE,
    SLIDING,
    Alike,
    FirstDense,
    Listed,
    NoRope,
    Types,
    Windowed,
)
from zoo.hf_rules import Experts, Greedy, Heads, LatentHeads, SharedExperts, Slot

SHARED_BIASED = experts(Score.sigmoid, normalize=True, d_shared=1, router={"balance_rate": 0.0})
GPT_OSS_ROPE: dict[str, object] = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
GPT_OSS_ROPE |= {"original_max_position_embeddings": 4096, "truncate": False}

ROWS = [
    Family(
        "deepseek_v2",
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        mixers={FULL: latent()},
        feeds={
            DENSE: SWIGLU,
            MOE: experts(Score.softmax, normalize=False, d_shared=1, router={"group_score": GroupScore.best}),
        },
        feed_kinds=FirstDense(),
        fields=DENSE_FIELDS | LATENT | {k: v for k, v in DEEPSEEK_MOE.items() if k != "moe.router.normalize"},
        rules=(LatentHeads(divides=True), SharedExperts(), Greedy()),
        absent=ABSENT | {"q_lora_rank": 1536, "topk_method": "greedy", "routed_scaling_factor": 1.0},
        fixed=UNBIASED_MLP | {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    ),
    Family(
        "deepseek_v3",  # and R1, and Kimi K2
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        mixers={FULL: latent()},
        feeds={DENSE: SWIGLU, MOE: SHARED_BIASED},
        feed_kinds=FirstDense(),
        fields=DENSE_FIELDS | LATENT | DEEPSEEK_MOE | GROUPS | {"mla.rope.interleaved": "rope_interleave"},
        rules=(LatentHeads(dim="head_dim"), SharedExperts()),
        absent=ABSENT
        | {"q_lora_rank": 1536, "norm_topk_prob": True, "rope_interleave": True, "num_key_value_heads": 128},
        fixed=UNBIASED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        names=hf_names.DEEPSEEK_V3,
    ),
    Family(
        "mixtral",
        "mixtral",
        "MixtralForCausalLM",
        mixers={FULL: attention(), SLIDING: attention(window=1)},
        feeds={MOE: experts(Score.softmax, normalize=True)},
        kinds=Windowed(),
        feed_kinds=Alike(MOE),
        fields=MODEL | WINDOW | LOCAL_MOE,
        absent=ABSENT | {"num_key_value_heads": 8, "rope_theta": 1e6},
        fixed=SILU,
        names=hf_names.MIXTRAL,
    ),
    Family(
        "llama4",
        "llama4_text",
        "Llama4ForCausalLM",
        mixers={
            CHUNKED: attention(
                interleaved=True, chunk=1, qk_norm=QKNormConfig(eps=1.0, kind=NormKind.bare, after_rope=True)
            ),
            NOPE: attention(rope=False, temperature=TemperatureConfig(kind=TemperatureKind.steps, floor=2, scale=1.0)),
        },
        feeds={
            DENSE: SWIGLU,
            MOE: experts(Score.sigmoid, normalize=False, d_shared=1, scale_input=True),
        },
        kinds=NoRope(CHUNKED),
        feed_kinds=Listed(),
        fields=MODEL
        | QK_NORM
        | LOCAL_MOE
        | {
            "mlp.d_ff": "intermediate_size_mlp",
            "moe.d_shared": "intermediate_size",
            "attention.chunk": "attention_chunk_size",
            "attention.temperature.floor": "floor_scale",
            "attention.temperature.scale": "attn_scale",
        },
        rules=(
            Heads(),
            Slot("attention.qk_norm", "use_qk_norm"),
            Slot("attention.temperature", "attn_temperature_tuning"),
        ),
        absent=ABSENT
        | {"head_dim": 128, "rope_theta": 500_000.0, "attention_chunk_size": 8192, "num_key_value_heads": 8}
        | {"floor_scale": 8192, "attn_scale": 0.1, "use_qk_norm": True, "attn_temperature_tuning": True},
        fixed=UNBIASED,
        names=hf_names.LLAMA4,
    ),
    Family(
        "qwen3_moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        mixers={FULL: attention(qk_norm=QKNormConfig(eps=1.0))},
        feeds={MOE: experts(Score.softmax, normalize=True)},
        feed_kinds=Alike(MOE),
        fields=MODEL | QK_NORM | QWEN_MOE,
        rules=(Heads(), Experts()),
        absent=ABSENT | {"norm_topk_prob": False, "num_key_value_heads": 4},
        fixed=UNBIASED | UNWINDOWED | EVERY_LAYER,
    ),
    Family(
        "gpt_oss",
        "gpt_oss",
        "GptOssForCausalLM",
        mixers={FULL: attention(sinks=True), SLIDING: attention(sinks=True, window=1)},
        feeds={
            MOE: experts(
                Score.softmax_chosen,
                normalize=False,
                activation=Activation.swiglu_clamped,
                bias=True,
                router={"bias": True},
            )
        },
        kinds=Types(SLIDING, interval=2),
        feed_kinds=Alike(MOE),
        fields=MODEL
        | WINDOW
        | LOCAL_MOE
        | {"attention.bias": "attention_bias", "attention.out_bias": "attention_bias"},
        absent=ABSENT
        | {"attention_bias": True, "sliding_window": 128, "rope_theta": 150_000.0, "head_dim": 64}
        | {"num_key_value_heads": 8, "rope_parameters": GPT_OSS_ROPE},
        fixed=SILU | {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        norm=NormConfig(eps=1.0, late_cast=True),
        names=hf_names.GPT_OSS,
    ),
    Family(
        "glm45",
        "glm4_moe",
        "Glm4MoeForCausalLM",
        mixers={FULL: attention(fraction=0.5, qk_norm=QKNormConfig(eps=1.0))},
        feeds={DENSE: SWIGLU, MOE: SHARED_BIASED},
        feed_kinds=FirstDense(),
        fields=DENSE_FIELDS | QK_NORM | DEEPSEEK_MOE | GROUPS | {"attention.bias": "attention_bias"},
        rules=(Heads(), SharedExperts(), Slot("attention.qk_norm", "use_qk_norm")),
        absent=ABSENT
        | {"attention_bias": False, "use_qk_norm": False, "norm_topk_prob": True, "num_key_value_heads": 8}
        | {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5},
        fixed=SILU,
        names=hf_names.GLM,
    ),
    Family(
        "qwen3_next",
        "qwen3_next",
        "Qwen3NextForCausalLM",
        mixers={
            FULL: attention(fraction=0.25, gate=True, qk_norm=QK_DEVIATIONS),
            LINEAR: DeltaNetConfig(n_k_heads=1, n_v_heads=1, k_dim=1, v_dim=1, conv=1, norm=NormConfig(eps=1.0)),
        },
        feeds={MOE: experts(Score.softmax, normalize=True, d_shared=1, shared_gate=True)},
        kinds=Types(LINEAR, interval=4, field="full_attention_interval"),
        feed_kinds=Alike(MOE),
        fields=MODEL
        | QK_NORM
        | QWEN_MOE
        | DELTA
        | {"moe.n_experts": "num_experts"}
        | {"moe.d_shared": "shared_expert_intermediate_size"},
        absent=ABSENT
        | {"head_dim": 256, "partial_rotary_factor": 0.25, "norm_topk_prob": True, "num_key_value_heads": 2}
        | {"linear_conv_kernel_dim": 4},
        fixed=UNBIASED | EVERY_LAYER,
        norm=DEVIATIONS,
        names=hf_names.QWEN3_NEXT,
    ),
]
