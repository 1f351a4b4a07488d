"""torchtitan's model code as a contender. Install: pip install --no-deps -r benchmarks/peers.txt."""

import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.contender import Contender, Peer, Precision, draw
from benchmarks.shape import Shape

# Its kernels for expert parallelism over several GPUs import Triton, which has no CPU; the model code does not call
# them. An empty module of that name lets the rest be imported.
KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"


class _NoKernels(ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


sys.modules.setdefault(KERNELS, _NoKernels(KERNELS))

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.config_utils import (  # noqa: E402
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_router_config,
)
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts  # noqa: E402
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # noqa: E402
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock  # noqa: E402
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock  # noqa: E402

INIT = {"weight": nn.init.zeros_}  # every parameter is drawn anew below


class Fp32Experts(GroupedExperts):
    """Its experts without their casts: as released they compute in bf16 even in an fp32 model."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """As its own."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """As its own, in the dtype of ``x``."""
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        product = partial(self._grouped_mm, offs=ends)
        h = nn.functional.silu(product(A=x, B_t=self.w1_EFD.transpose(-2, -1)))
        h = h * product(A=x, B_t=self.w3_EFD.transpose(-2, -1))
        return product(A=h, B_t=self.w2_EDF.transpose(-2, -1))


def build(shape: Shape, *, precision: Precision) -> Contender:
    """The model with sdpa attention (flex has no backward on a CPU) and the chunked loss of its training configs."""
    model = draw(_model(shape, precision).build(), seed=0)
    for buffer in model.buffers():
        assert not buffer.is_meta, "torchtitan made a buffer on the meta device"
    if precision is Precision.pure:
        for parameter in model.parameters():  # not .to(): it would drop the imaginary part of the rotary table
            parameter.data = parameter.data.to(torch.bfloat16)
    chunked = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=shape.vocab_size)).build()
    chunked.set_lm_head(model.lm_head)
    model._skip_lm_head = True  # type: ignore[assignment]  # its trainer does the same for this loss

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        total, _ = chunked(model(tokens), targets, torch.tensor(float(targets.numel())))
        return total

    parts = "Llama3Model"
    if shape.experts:
        parts = "Qwen3Model without QK norm, sigmoid router, experts by grouped_mm"
        parts += ", its casts of experts to bf16 removed" if precision is Precision.fp32 else ""
    about = f"torchtitan {version('torchtitan')}, {parts}; fused wqkv; sdpa attention; ChunkedLossWrapper of 8 chunks"
    return Peer(model, loss, about, precision)


def _model(shape: Shape, precision: Precision) -> Llama3Model.Config | Qwen3Model.Config:
    kind = Qwen3Model if shape.experts else Llama3Model
    linear = Linear.Config(in_features=shape.d_model, out_features=shape.vocab_size, param_init=INIT)
    embedding = Embedding.Config(num_embeddings=shape.vocab_size, embedding_dim=shape.d_model, param_init=INIT)
    return kind.Config(
        dim=shape.d_model,
        vocab_size=shape.vocab_size,
        tok_embeddings=embedding,
        norm=_norm(shape),
        lm_head=linear,
        layers=[_layer(shape, precision) for _ in range(shape.n_layers)],
    )


def _norm(shape: Shape) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=shape.d_model, eps=shape.eps, param_init=INIT)


def _layer(shape: Shape, precision: Precision) -> Llama3TransformerBlock.Config | Qwen3TransformerBlock.Config:
    attention = make_gqa_config(
        dim=shape.d_model,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        wqkv_param_init=INIT,
        wo_param_init=INIT,
        inner_attention=ScaledDotProductAttention.Config(),
        fuse_qkv=True,
        rope=ComplexRoPE.Config(dim=shape.head_dim, max_seq_len=shape.seq_len, theta=shape.theta),
    )
    norms = {"attention_norm": _norm(shape), "ffn_norm": _norm(shape)}
    if shape.experts:
        return Qwen3TransformerBlock.Config(attention=attention, moe=_moe(shape, precision), **norms)
    ffn = make_ffn_config(dim=shape.d_model, hidden_dim=shape.d_ff, w1_param_init=INIT, w2w3_param_init=INIT)
    return Llama3TransformerBlock.Config(attention=attention, feed_forward=ffn, **norms)


def _moe(shape: Shape, precision: Precision) -> object:
    assert shape.experts is not None, f"{shape=}"
    e = shape.experts
    kind = Fp32Experts if precision is Precision.fp32 else GroupedExperts
    experts = kind.Config(dim=shape.d_model, hidden_dim=e.d_expert, num_experts=e.n_experts, param_init=INIT)
    dispatcher = LocalTokenDispatcher.Config(num_experts=e.n_experts, top_k=e.top_k)
    router = make_router_config(
        dim=shape.d_model, num_experts=e.n_experts, gate_param_init=INIT, top_k=e.top_k, route_norm=True
    )
    routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher)
    return make_moe_config(num_experts=e.n_experts, router=router, routed_experts=routed)
