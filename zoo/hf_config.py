"""``config.json`` of a Hugging Face folder, read into a ``ModelConfig`` and written from one.

Every field that changes what a model computes is either mapped or must hold the one value that the zoo builds; an
absent one means what transformers 5.23 takes it for. How routers are balanced a folder does not say: it is read as off.
"""

import copy
from dataclasses import dataclass
from typing import Any

from zoo.config import (
    AttentionConfig,
    BlockConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
    expanded,
)
from zoo.hf_fields import Fields, HFError
from zoo.hf_rope import read_rope, write_rope

LATENT_EPS = 1e-6
"""Of MLA's two inner norms: transformers' DeepSeek-V3 keeps its norm's default, whatever rms_norm_eps says."""

QWEN_HEAD_DIM = 128
"""Of a Qwen3 config without head_dim."""


@dataclass(frozen=True)
class Family:
    """An architecture as transformers names it.

    Attributes:
        name: ours.
        model_type: theirs.
        architecture: their class that computes logits.
        fixed: fields that the zoo builds with one value only: (that value, what an absent field means).
    """

    name: str
    model_type: str
    architecture: str
    fixed: dict[str, tuple[object, object]]


FIXED: dict[str, tuple[object, object]] = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "attention_dropout": (0.0, 0.0),
    "quantization_config": (None, None),
}
FAMILIES = [
    Family("llama3", "llama", "LlamaForCausalLM", FIXED | {"mlp_bias": (False, False)}),
    Family("qwen3", "qwen3", "Qwen3ForCausalLM", FIXED | {"use_sliding_window": (False, False)}),
    Family(
        "deepseek_v3",
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        FIXED
        | {
            "scoring_func": ("sigmoid", "sigmoid"),
            "topk_method": ("noaux_tc", "noaux_tc"),
            "norm_topk_prob": (True, True),
            "moe_layer_freq": (1, 1),
        },
    ),
]


def parse(raw: dict[str, Any], *, source: str) -> ModelConfig:
    """Read the fields of a ``config.json``.

    Raises:
        HFError: a field is missing, ill-typed or asks for what the zoo does not build; names ``source`` and the field.
    """
    fields = Fields(raw, source=source)
    known = {family.model_type: family for family in FAMILIES}
    family = known.get(str(raw.get("model_type")))
    if family is None:
        raise fields.fault("model_type", f"one of {sorted(known)}")
    if raw.get("architectures") not in (None, [family.architecture]):
        raise fields.fault("architectures", f'["{family.architecture}"]')
    for key, (only, absent) in family.fixed.items():
        fields.fixed(key, only, absent=absent)
    try:
        return _read_deepseek(fields) if family.name == "deepseek_v3" else _read_dense(fields, family.name)
    except HFError:
        raise
    except ValueError as error:  # a check of zoo/config.py
        raise HFError(f"{source}: {error}") from error


def render(config: ModelConfig) -> dict[str, Any]:
    """Write the fields of a ``config.json``, each explicitly: no checkpoint is what a class defaults to.

    Raises:
        HFError: transformers has no such family, or its class cannot hold some value; names the key.
    """
    known = {family.name: family for family in FAMILIES}
    if config.family not in known:
        raise HFError(f"model.family={config.family}: must be one of {sorted(known)} for a Hugging Face folder")
    family = known[config.family]
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    raw |= {key: only for key, (only, _) in family.fixed.items() if only is not None}
    raw |= _write_deepseek(config) if family.name == "deepseek_v3" else _write_dense(config)
    back = parse(raw, source="config.json")
    _compare(_function(config), _function(back), key="model", family=family)
    return raw


def _read_model(fields: Fields, **parts: Any) -> ModelConfig:
    """What all families have in common, and ``parts``."""
    return ModelConfig(
        d_model=fields.whole("hidden_size"),
        n_layers=fields.whole("num_hidden_layers"),
        vocab_size=fields.whole("vocab_size"),
        context=fields.whole("max_position_embeddings"),
        norm=NormConfig(fields.number("rms_norm_eps")),
        tied=fields.flag("tie_word_embeddings", absent=False),
        init_std=fields.number("initializer_range", absent=0.02),
        **parts,
    )


def _read_dense(fields: Fields, family: str) -> ModelConfig:
    kinds = fields.raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}):
        raise fields.fault("layer_types", "full_attention in every layer")
    n_heads = fields.whole("num_attention_heads")
    qwen = family == "qwen3"
    attention = AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=fields.whole("num_key_value_heads", absent=n_heads),
        head_dim=fields.whole("head_dim", absent=QWEN_HEAD_DIM if qwen else fields.whole("hidden_size") // n_heads),
        rope=read_rope(fields, interleaved=False),
        qk_norm=NormConfig(fields.number("rms_norm_eps")) if qwen else None,
    )
    block = BlockConfig(attention=attention, mlp=MLPConfig(fields.whole("intermediate_size")))
    return _read_model(fields, family=family, blocks={"dense": block}, cycle=["dense"])


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    if layer.attention is None or layer.mlp is None:
        raise HFError(f"model.blocks.{config.kinds[0]}: must have attention and mlp in family {config.family}")
    attention = layer.attention
    if config.family == "llama3" and config.d_model % attention.n_heads:
        raise HFError(f"model.d_model={config.d_model}: must be a multiple of n_heads ({attention.n_heads}) for Llama")
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": layer.mlp.d_ff,
        **write_rope(attention.rope, context=config.context),
    }


def _read_deepseek(fields: Fields) -> ModelConfig:
    n_heads, n_layers = fields.whole("num_attention_heads"), fields.whole("num_hidden_layers")
    if fields.whole("num_key_value_heads", absent=n_heads) != n_heads:
        raise fields.fault("num_key_value_heads", f"num_attention_heads ({n_heads})")
    mla = MLAConfig(
        n_heads=n_heads,
        q_rank=None if fields.raw.get("q_lora_rank") is None else fields.whole("q_lora_rank"),
        kv_rank=fields.whole("kv_lora_rank"),
        nope_dim=fields.whole("qk_nope_head_dim"),
        rope_dim=fields.whole("qk_rope_head_dim"),
        v_dim=fields.whole("v_head_dim"),
        norm=NormConfig(LATENT_EPS),
        rope=read_rope(fields, interleaved=fields.flag("rope_interleave", absent=True)),
    )
    moe = MoEConfig(
        n_experts=fields.whole("n_routed_experts"),
        top_k=fields.whole("num_experts_per_tok"),
        d_expert=fields.whole("moe_intermediate_size"),
        d_shared=fields.whole("moe_intermediate_size") * fields.whole("n_shared_experts"),
        router=RouterConfig(
            scale=fields.number("routed_scaling_factor"),
            n_groups=fields.whole("n_group"),
            top_groups=fields.whole("topk_group"),
            balance_rate=0.0,
            balance_loss=0.0,
        ),
    )
    blocks = {
        "dense": BlockConfig(mla=mla, mlp=MLPConfig(fields.whole("intermediate_size"))),
        "moe": BlockConfig(mla=mla, moe=moe),
    }
    return _read_model(
        fields,
        family="deepseek_v3",
        blocks=blocks,
        prefix=["dense"] * min(fields.whole("first_k_dense_replace", least=0), n_layers),
        cycle=["moe"],
        n_mtp=fields.whole(
            "num_nextn_predict_layers", absent=fields.whole("num_mtp_layers", absent=1, least=0), least=0
        ),
    )


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
    dense = [layer.mlp for layer in config.layers if layer.mlp is not None]
    last = config.layers[-1]
    if last.mla is None or last.moe is None:
        raise HFError(f"model.blocks.{config.kinds[-1]}: must have mla and moe in family {config.family}")
    mla, moe = last.mla, last.moe
    return {
        "num_attention_heads": mla.n_heads,
        "num_key_value_heads": mla.n_heads,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.v_dim,
        "rope_interleave": mla.rope.interleaved,
        **write_rope(mla.rope, context=config.context),
        "first_k_dense_replace": len(dense),
        "intermediate_size": dense[0].d_ff if dense else moe.d_expert,
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_expert,
        "n_shared_experts": moe.d_shared // moe.d_expert,
        "routed_scaling_factor": moe.router.scale,
        "n_group": moe.router.n_groups,
        "topk_group": moe.router.top_groups,
        "num_nextn_predict_layers": config.n_mtp,
    }


def _function(config: ModelConfig) -> dict[str, Any]:
    """What of a config decides logits, as plain data: layers in order, without names, training or scaling at rest."""
    config = copy.deepcopy(config)
    for block in config.blocks.values():
        mixer = block.attention or block.mla
        assert mixer is not None, f"{block=}"
        if write_rope(mixer.rope, context=config.context)["rope_scaling"] is None:
            mixer.rope.scaling = None
        if block.moe is not None:
            block.moe.router.balance_rate = block.moe.router.balance_loss = 0.0
    plain = expanded(config)
    del plain["init_std"]
    return plain


def _compare(ours: Any, theirs: Any, *, key: str, family: Family) -> None:
    """Refuse what did not survive being written and read: the folder could not hold it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in ours:
            _compare(ours[name], theirs[name], key=f"{key}.{name}", family=family)
    elif isinstance(ours, list) and isinstance(theirs, list):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _compare(one, other, key=f"{key}.{place}", family=family)
    elif ours != theirs:
        raise HFError(f"{key}={ours}: must be {theirs}, all that {family.architecture} can hold")
