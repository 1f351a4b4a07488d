"""QK-Clip's numbers."""

import math
from dataclasses import dataclass

from omegaconf import MISSING

from trainer.config_check import check


@dataclass
class QKClipConfig:
    """QK-Clip, arXiv 2507.20534, section 2.1: weights of queries and keys shrink where an attention logit is large."""

    tau: float = MISSING  # the largest attention logit that a head may have
    alpha: float = MISSING  # of what shrinks, the queries' share as an exponent; the keys' is 1 - alpha

    def __post_init__(self) -> None:
        check(0 < self.tau < math.inf, "optim.qk_clip.tau", self.tau, "above 0, and finite")
        check(0 <= self.alpha <= 1, "optim.qk_clip.alpha", self.alpha, "0 to 1")
