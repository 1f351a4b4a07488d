"""What the benchmark asks of an implementation, and the update that all the peers share."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn

LR, BETAS, EPS, DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


class Precision(StrEnum):
    """How an implementation computes."""

    fp32 = "fp32"
    mixed = "mixed"  # weights, gradients and moments fp32, products bf16: the peers' by torch.autocast
    pure = "pure"  # everything bf16, moments too: another training, at its cheapest; only peers, for comparison


class Contender(Protocol):
    """One implementation with its model and optimizer."""

    about: str  # what exactly runs, in one line
    n_parameters: int  # that the optimizer moves

    def gradients(self, tokens: Tensor, targets: Tensor) -> float:
        """Forward, loss and backward of (B, T) int64 tokens; the mean loss in nats."""

    def update(self) -> None:
        """Clip, AdamW step, forget the gradients."""


@dataclass
class Peer:
    """A torch module of another project under torch's fused AdamW and torch's own clipping.

    Attributes:
        model: takes part with all its parameters.
        loss: tokens and targets, each (B, T), to the mean loss.
        about: what exactly runs.
        precision: of the step.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    about: str
    precision: Precision

    def __post_init__(self) -> None:
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.n_parameters = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def gradients(self, tokens: Tensor, targets: Tensor) -> float:
        """Forward and backward; under ``mixed`` by torch.autocast, as these projects train on one device."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision is Precision.mixed):
            loss = self.loss(tokens, targets)
        loss.backward()
        return loss.item()

    def update(self) -> None:
        """Clip, step, forget."""
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def draw(model: nn.Module, *, seed: int) -> nn.Module:
    """Give every matrix values of a normal distribution with deviation 0.02 and every vector ones, as all others get.

    Buffers are left as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model
