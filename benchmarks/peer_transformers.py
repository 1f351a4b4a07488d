"""transformers as a contender. Install: pip install --no-deps -r benchmarks/peers.txt."""

from typing import Any

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import __version__ as version

from benchmarks.contender import Contender, Peer, Precision, draw
from benchmarks.shape import Shape

ABOUT = {
    False: "LlamaForCausalLM",
    True: "Glm4MoeForCausalLM, its class nearest to this model (grouped queries, sigmoid router; one group, shared "
    "expert of width 0), experts by grouped_mm, its default, which autocast leaves in fp32",
}


def build(shape: Shape, *, precision: Precision) -> Contender:
    """The model with sdpa attention and the loss that its ``forward`` gives (fp32 logits of all tokens at once)."""
    model = draw(_moe(shape) if shape.experts else _dense(shape), seed=0)
    if precision is Precision.pure:
        model.to(torch.bfloat16)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    about = f"transformers {version}, {ABOUT[shape.experts is not None]}; sdpa attention; its own loss"
    return Peer(model, loss, about, precision)


def _common(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.seq_len,
        "rms_norm_eps": shape.eps,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }


def _dense(shape: Shape) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": shape.theta}
    return LlamaForCausalLM(
        LlamaConfig(**_common(shape), intermediate_size=shape.d_ff, rope_parameters=rope, mlp_bias=False)
    )


def _moe(shape: Shape) -> Glm4MoeForCausalLM:
    assert shape.experts is not None, f"{shape=}"
    e = shape.experts
    rope = {"rope_type": "default", "rope_theta": shape.theta, "partial_rotary_factor": 1.0}
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **_common(shape),
            intermediate_size=shape.d_ff,
            rope_parameters=rope,
            moe_intermediate_size=e.d_expert,
            n_routed_experts=e.n_experts,
            num_experts_per_tok=e.top_k,
            n_shared_experts=0,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            first_k_dense_replace=0,
            num_mtp_layers=0,
        )
    )
