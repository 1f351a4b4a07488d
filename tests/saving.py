"""States to store and ways to store them, for tests of checkpoints."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
from trainer.tree import flatten

ABOUT = {"model": {"d_model": 12, "cycle": ["moe"]}, "tokenizer": "5e1f"}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
PROGRESS = {"step": 3, "tokens": 96, "loader": {"batch": 3}, "seed_used": 0.1 + 0.2}


def config(*, every: int = 1, keep: int = 0, resume: str = "auto") -> CheckpointConfig:
    return CheckpointConfig(every=every, keep=keep, resume=resume, init=None)


def alone(folder: Path, *, about: dict[str, Any] = ABOUT, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, config=config(**settings), rank=0, world_size=1, about=about)


def grouped(folder: Path, *, about: dict[str, Any] = ABOUT, **settings: Any) -> Checkpoints:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Checkpoints(folder, config=config(**settings), rank=rank, world_size=world_size, about=about)


class Small(nn.Module):
    """Awkward on purpose: odd sizes, one row, a scalar's worth of bias, a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 17)
        self.down = nn.Linear(17, 1)
        self.balance_bias: Tensor
        self.register_buffer("balance_bias", torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 12) to (N, 1)."""
        return self.down(torch.relu(self.up(x)))


def trained(layout: str, *, dtype: torch.dtype, steps: int, seed: int = 0) -> dict[str, Any]:
    """The live state of a small model after some updates on the same data in every layout."""
    torch.manual_seed(seed)
    model = Small().to(dtype)
    if layout != "plain":
        size = dist.get_world_size()
        names = {"fsdp": ("shard",), "hsdp": ("replicate", "shard")}[layout]
        shape = {"fsdp": (size,), "hsdp": (2, size // 2)}[layout]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for i in range(max(steps, 1)):
        torch.manual_seed(i)
        model(torch.randn(8, 12, dtype=dtype)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.balance_bias.add_(0.001)
    if steps == 0:
        with torch.no_grad():
            for leaf in flatten({"m": model.state_dict(), "o": optimizer.state_dict()["state"]}).values():
                (leaf.to_local() if isinstance(leaf, DTensor) else leaf).fill_(-7)
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def full(state: dict[str, Any]) -> dict[str, Any]:
    """Every leaf by name, DTensors gathered, tensors as bytes, so that equal means bitwise equal."""
    leaves = {}
    for name, leaf in flatten(state).items():
        if isinstance(leaf, Tensor):
            whole = leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
            leaf = (str(whole.dtype), tuple(whole.shape), bytes(whole.detach().contiguous().view(-1).view(torch.uint8)))
        leaves[name] = leaf
    return leaves


def small_state(fill_value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"up.weight": torch.full((4, 3), fill_value), "bias": torch.full((5,), fill_value)},
        "optimizer": {"state": {"up.weight": {"step": torch.tensor(fill_value)}}, "groups": [{"betas": (0.9, 0.95)}]},
    }
