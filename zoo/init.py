"""Initial values, each a function of the seed and the parameter's name alone: no layout of ranks can change them."""

import hashlib
import math

import torch
from torch import Tensor, nn

from zoo.config import BlockConfig, ModelConfig
from zoo.config_mixer import NormConfig

DECAY_RATES = (0.01, 16.0)
"""Between which Gated DeltaNet's decay rates lie at the start, evenly (transformers' Qwen3-Next; unpublished)."""


def initial(name: str, shape: torch.Size, *, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial value of one parameter, fp32 on the CPU.

    Matrices are normal with ``config.init.std``; norms multiply by one; biases and sinks are zero.
    """
    leaf = name.rpartition(".")[2]
    if leaf == "dt_bias":
        return torch.ones(shape)
    if leaf.endswith("bias") or leaf == "sinks":
        return torch.zeros(shape)
    if leaf == "log_decay":
        return torch.empty(shape, device="cpu").uniform_(*DECAY_RATES, generator=_generator(name, seed)).log()
    if name.endswith("norm.weight"):
        return torch.full(shape, 1 - _norm(name, config).offset)
    return _matrix(name, shape, config=config, generator=_generator(name, seed))


@torch.no_grad()
def initialize(model: nn.Module, *, config: ModelConfig, seed: int) -> None:
    """Fill a model that lies whole on one device: parameters by ``initial``, buffers with zeros."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial(name, parameter.shape, config=config, seed=seed))
    for buffer in model.buffers():
        buffer.zero_()


def _generator(name: str, seed: int) -> torch.Generator:
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


def _matrix(name: str, shape: torch.Size, *, config: ModelConfig, generator: torch.Generator) -> Tensor:
    init = config.init
    std = init.std
    if init.scale_residual and ".".join(name.split(".")[-2:]) in ("wo.weight", "down.weight", "experts.down"):
        std /= math.sqrt(2 * config.n_layers)
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    if init.cutoff is None:
        return values.normal_(0, std, generator=generator)
    bound = init.cutoff * std
    return nn.init.trunc_normal_(values, 0, std, -bound, bound, generator=generator)


def _norm(name: str, config: ModelConfig) -> NormConfig:
    """Config of the norm whose weight this is.

    Example: blocks.3.mixer.q_norm.weight is the query norm of the fourth layer's mixer, norm.weight the model's.
    """
    parts = name.split(".")
    if "mixer" not in parts:
        return config.norm
    layer: BlockConfig = config.layers[int(parts[1]) if parts[0] == "blocks" else -1]
    if layer.mla is not None:
        return layer.mla.norm
    if layer.deltanet is not None:
        return layer.deltanet.norm
    assert layer.attention is not None and layer.attention.qk_norm is not None, f"{name=}"
    return layer.attention.qk_norm
