"""When an update counts as an outlier."""

import math
from dataclasses import dataclass

from omegaconf import MISSING

from trainer.config_check import check


@dataclass
class OutliersConfig:
    """Loss or gradient norm is above mean + ``sigma`` standard deviations of the ``window`` updates before it."""

    sigma: float = MISSING
    window: int = MISSING  # updates; until half of them are made, nothing is an outlier

    def __post_init__(self) -> None:
        check(0 < self.sigma < math.inf, "sigma", self.sigma, "above 0, and finite")
        check(self.window >= 4, "window", self.window, "4 or more")
