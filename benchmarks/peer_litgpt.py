"""litgpt as a contender. Install: pip install --no-deps -r benchmarks/peers.txt."""

from importlib.metadata import version
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from benchmarks.contender import Contender, Peer, Precision, draw
from benchmarks.shape import Shape


def build(shape: Shape, *, precision: Precision) -> Contender:
    """``GPT`` with the loss that ``litgpt pretrain`` uses (all logits, cross-entropy in chunks of 128 tokens)."""
    config = Config(
        name="benchmark",
        block_size=shape.seq_len,
        n_layer=shape.n_layers,
        n_embd=shape.d_model,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=shape.eps,
        parallel_residual=False,
        n_head=shape.n_heads,
        n_query_groups=shape.n_kv_heads,
        rotary_percentage=1.0,
        rope_base=int(shape.theta),
        bias=False,
        mlp_class_name="LLaMAMoE" if shape.experts else "LLaMAMLP",
        intermediate_size=shape.d_ff,
        **_experts(shape),
    )
    model = draw(GPT(config), seed=0)
    if precision is Precision.pure:
        model.to(torch.bfloat16)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(model(tokens), targets)

    parts = (
        "LLaMAMoE (loop over experts), softmax over the chosen logits (its sigmoid router wants groups)"
        if shape.experts
        else "LLaMAMLP"
    )
    about = f"litgpt {version('litgpt')}, GPT with {parts}; sdpa attention; chunked_cross_entropy of pretrain.py"
    return Peer(model, loss, about, precision)


def _experts(shape: Shape) -> dict[str, Any]:
    if shape.experts is None:
        return {}
    e = shape.experts
    return {
        "moe_intermediate_size": e.d_expert,
        "n_expert": e.n_experts,
        "n_expert_per_token": e.top_k,
    }
