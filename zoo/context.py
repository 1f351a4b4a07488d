"""What every layer of one forward shares: positions, mask, and how balance losses are divided."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.config import RopeConfig
from zoo.mask import Mask
from zoo.rope import Rotation, rotation


@dataclass
class Context:
    """Made once a forward, handed to every block.

    Attributes:
        positions: (B, T), counted from the start of each document.
        mask: who sees whom.
        dtype: of the activations.
        length: tokens the model is configured for.
        rows: rows of the global batch, a scalar that divides the balance losses; None: no such loss is wanted.
    """

    positions: Tensor
    mask: Mask
    dtype: torch.dtype
    length: int
    rows: Tensor | None = None
    made: list[tuple[RopeConfig, int, Rotation]] = field(default_factory=list)

    def rotation(self, config: RopeConfig, *, dim: int) -> Rotation:
        """The rotation of these positions; layers with equal configs share one."""
        for known, known_dim, result in self.made:
            if known_dim == dim and known == config:
                return result
        result = rotation(config, positions=self.positions, dim=dim, context=self.length, dtype=self.dtype)
        self.made.append((config, dim, result))
        return result
