"""Which updates are outliers, and which of them are skipped; a run whose numbers are lost ends.

Source of the rule: github allenai/OLMo-core, src/olmo_core/optim/skip_step_optimizer.py; OLMo 2 32B was trained with it
(src/scripts/official/OLMo2/OLMo-2-0325-32B-train.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config_outliers import OutliersConfig
from trainer.state import History

PATIENCE = 8
"""Updates in a row that may be skipped because their numbers are none. What OLMo-core skips without end here ends."""


class Diverged(ArithmeticError):
    """A loss or gradient norm that is no number: the update that made it is in no checkpoint."""


@dataclass(frozen=True)
class Excess:
    """A number above those before it.

    Attributes:
        value: the number.
        mean: of those before it.
        std: their standard deviation.
    """

    value: float
    mean: float
    std: float


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of one update.

    Attributes:
        outliers: by ``loss`` and ``grad_norm``, what is too high.
        lost: of the two, what is no number.
        skips: whether the update shall change nothing.
        ends: why the run cannot go on; None: it can.
    """

    outliers: dict[str, Excess]
    lost: list[str]
    skips: bool
    ends: str | None

    @property
    def notable(self) -> bool:
        """Whether there is something to tell."""
        return bool(self.outliers or self.lost)


def excess(value: float, past: Sequence[float], *, rule: OutliersConfig) -> Excess | None:
    """How a number exceeds mean + sigma standard deviations of at most ``window`` before it; None: it does not.

    What falls is no outlier. Nothing is one before, with it, half a window is there.

    Example: of a window of 4, sigma 2: 5 is one after 1 2 3, of mean 2 and deviation 1; 4 is not.
    """
    recent = past[-rule.window :]
    if len(recent) + 1 < max(3, rule.window // 2):
        return None
    mean = math.fsum(recent) / len(recent)
    std = math.sqrt(math.fsum((each - mean) ** 2 for each in recent) / (len(recent) - 1))
    return Excess(value, mean, std) if value > mean + rule.sigma * std else None


class Guard:
    """Judges every update once, from numbers that all ranks have alike, so that all ranks judge alike."""

    def __init__(self, rule: OutliersConfig, *, skips: bool, history: History) -> None:
        """Go on from what is remembered.

        Args:
            rule: which updates are outliers.
            skips: whether these change nothing.
            history: of the run; it is kept up to date.
        """
        self.rule, self.skips, self.history = rule, skips, history

    def judge(self, *, step: int, loss: float, norm: float) -> Verdict:
        """What to think of update ``step``, and remember it. An outlier is remembered too; what is no number is not."""
        history, numbers = self.history, {"loss": loss, "grad_norm": norm}
        lost = [key for key, value in numbers.items() if not math.isfinite(value)]
        history.lost = history.lost + 1 if lost else 0
        if lost:
            ends = None
            if not self.skips or history.lost > PATIENCE:
                ends = f"step {step}: {lost[0]} is {numbers[lost[0]]}; no checkpoint was made of it"
                if self.skips:
                    ends += f", nor of the {PATIENCE} skipped before it, which were no better"
            return Verdict({}, lost, skips=ends is None, ends=ends)
        outliers = {}
        for key, past in (("loss", history.losses), ("grad_norm", history.norms)):
            found = excess(numbers[key], past, rule=self.rule)
            if found is not None:
                outliers[key] = found
            past.append(numbers[key])
            del past[: max(len(past) - self.rule.window, 0)]
        return Verdict(outliers, [], skips=self.skips and bool(outliers), ends=None)
