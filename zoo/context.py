"""What every layer of one forward shares: positions, masks, and how balance losses are divided."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.config_mixer import RopeConfig
from zoo.mask import Mask
from zoo.rope import Rotation, rotation


@dataclass
class Context:
    """Made once a forward, handed to every block.

    Attributes:
        positions: (B, T), counted from the start of each document.
        documents: (B, T), a number that differs between the documents of a row; None: each row is one document.
        dtype: of the activations.
        length: tokens the model is configured for.
        rows: rows of the global batch, a scalar that divides the balance losses; None: no such loss is wanted.
    """

    positions: Tensor
    documents: Tensor | None
    dtype: torch.dtype
    length: int
    rows: Tensor | None = None
    rotations: list[tuple[RopeConfig, int, Rotation]] = field(default_factory=list)
    masks: dict[tuple[int | None, int | None], Mask] = field(default_factory=dict)

    def rotation(self, config: RopeConfig, *, dim: int) -> Rotation:
        """The rotation of these positions in heads of ``dim`` dimensions; layers with equal configs share one."""
        for known, known_dim, result in self.rotations:
            if known_dim == dim and known == config:
                return result
        result = rotation(config, positions=self.positions, dim=dim, context=self.length, dtype=self.dtype)
        self.rotations.append((config, dim, result))
        return result

    def mask(self, *, window: int | None = None, chunk: int | None = None) -> Mask:
        """Who sees whom; layers with equal windows and chunks share one."""
        result = Mask(self.documents, self.positions, window, chunk)
        return self.masks.setdefault((result.window, result.chunk), result)
