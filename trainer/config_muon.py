"""Muon's numbers."""

import math
from dataclasses import dataclass

from omegaconf import MISSING

from trainer.config_check import check


@dataclass
class MuonConfig:
    """Muon for matrices; what else there is gets AdamW. Source: arXiv 2502.16982, section 2."""

    momentum: float = MISSING
    nesterov: bool = MISSING  # whether the gradient is added to the momentum once more
    ns_steps: int = MISSING  # of Newton-Schulz
    coefficients: list[float] = MISSING  # of a step: of the matrix, of its cube and of its fifth power
    update_rms: float = MISSING  # of an n x m update at lr 1: it is scaled by this times sqrt(max(n, m))

    def __post_init__(self) -> None:
        check(0 <= self.momentum < 1, "optim.muon.momentum", self.momentum, "from 0 up to, not including, 1")
        check(1 <= self.ns_steps < 100, "optim.muon.ns_steps", self.ns_steps, "1 to 99")
        finite = len(self.coefficients) == 3 and all(math.isfinite(each) for each in self.coefficients)
        check(finite, "optim.muon.coefficients", self.coefficients, "three finite numbers")
        check(0 < self.update_rms < math.inf, "optim.muon.update_rms", self.update_rms, "above 0, and finite")
