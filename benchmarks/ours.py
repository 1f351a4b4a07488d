"""Our own step, by the parts that a run uses: the zoo's decoder, the torch engine, the router's balancing."""

import torch
from torch import Tensor

from benchmarks.contender import BETAS, DECAY, EPS, LR, MAX_NORM, Contender, Precision
from benchmarks.shape import Shape
from data.batch import Batch
from parallel.apply import build as build_model
from parallel.apply import fill_fresh
from parallel.config import Dtype, PrecisionConfig
from parallel.config_fit import Sizes
from parallel.mesh import open_mesh
from trainer import balance
from trainer.config import OptimConfig, OptimKind, TrainConfig
from trainer.engine import TorchEngine, count
from zoo.config import BlockConfig, InitConfig, ModelConfig
from zoo.config_ff import MLPConfig, MoEConfig, RouterConfig, Score
from zoo.config_mixer import AttentionConfig, NormConfig, RopeConfig

LOSS_CHUNK = 1024  # conf/train/default.yaml


class Ours:
    """``Trainer.step`` without data, schedule and log."""

    about = f"zoo.Decoder under trainer.TorchEngine: fused AdamW, chunked cross-entropy of {LOSS_CHUNK} tokens"

    def __init__(self, shape: Shape, precision: Precision) -> None:
        self.mesh = open_mesh(Sizes(dp_replicate=1, dp_shard=1), rank=0, local_rank=0)
        compute = Dtype.fp32 if precision is Precision.fp32 else Dtype.bf16
        config = PrecisionConfig(params=Dtype.fp32, compute=compute)
        model = build_model(model_config(shape), mesh=self.mesh, precision=config)
        fill_fresh(model, seed=0)
        model.train()
        optim = OptimConfig(kind=OptimKind.adamw, lr=LR, weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
        self.engine = TorchEngine(model, mesh=self.mesh, train=train_config(shape), optim_config=optim)
        self.n_parameters = sum(p.numel() for p in model.parameters())

    def gradients(self, tokens: Tensor, targets: Tensor) -> float:
        """Forward and backward of one micro-batch; each row is one document, as it is to the peers."""
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        none = tokens.new_zeros(tokens.shape[0], 0, tokens.shape[1])
        batches = [Batch(tokens, targets, positions, torch.zeros_like(tokens), none, none)]
        return self.engine.forward_backward(batches, count(batches, self.mesh)).losses[0].item()

    def update(self) -> None:
        """Clip, step, forget, balance."""
        self.engine.update(max_norm=MAX_NORM)
        balance.update(self.engine.model, self.mesh)


def build(shape: Shape, *, precision: Precision) -> Contender:
    """Ours in fp32, or in bf16 over fp32 weights and moments."""
    assert precision is not Precision.pure, f"{precision=}"
    return Ours(shape, precision)


def model_config(shape: Shape) -> ModelConfig:
    """The shape as an architecture of the zoo."""
    attention = AttentionConfig(
        n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads, head_dim=shape.head_dim, rope=RopeConfig(theta=shape.theta)
    )
    mlp = MLPConfig(d_ff=shape.d_ff) if shape.experts is None else None
    return ModelConfig(
        family="llama3",
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        vocab_size=shape.vocab_size,
        context=shape.seq_len,
        blocks={"layer": BlockConfig(attention=attention, mlp=mlp, moe=_moe(shape))},
        cycle=["layer"],
        norm=NormConfig(eps=shape.eps),
        init=InitConfig(std=0.02),
    )


def _moe(shape: Shape) -> MoEConfig | None:
    if shape.experts is None:
        return None
    e = shape.experts
    router = RouterConfig(score=Score.sigmoid, normalize=True, scale=1.0, balance_rate=0.001)
    return MoEConfig(n_experts=e.n_experts, top_k=e.top_k, d_expert=e.d_expert, d_shared=0, router=router)


def train_config(shape: Shape) -> TrainConfig:
    """What the engine reads of a run's settings; the rest is never used here."""
    return TrainConfig(
        steps=1,
        global_batch=shape.rows,
        micro_batch=shape.rows,
        seq_len=shape.seq_len,
        max_norm=MAX_NORM,
        mtp_weight=0.0,
        loss_chunk=LOSS_CHUNK,
        eval_every=0,
        eval_rows=1,
        sample_tokens=0,
        sample_prompt="",
    )
