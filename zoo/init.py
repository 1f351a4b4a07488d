"""Initial values, each a function of the seed and the parameter's name alone: no layout of ranks can change them."""

import hashlib

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig


def initial(name: str, shape: torch.Size, *, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial value of one parameter, fp32 on the CPU.

    Norm weights, the only vectors, are ones; every matrix is normal with ``config.init_std``.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0, config.init_std, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, *, config: ModelConfig, seed: int) -> None:
    """Fill a model that lies whole on one device: parameters by ``initial``, buffers with zeros."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial(name, parameter.shape, config=config, seed=seed))
    for buffer in model.buffers():
        buffer.zero_()
