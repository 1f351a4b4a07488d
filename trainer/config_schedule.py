"""What changes while a run goes on, as data: learning rate, loss weights, batch size, rotary positions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from trainer.config_check import check


class ScheduleKind(StrEnum):
    """Shapes of the learning rate."""

    cosine = "cosine"
    wsd = "wsd"  # warmup, stable, decay
    linear = "linear"
    inverse_sqrt = "inverse_sqrt"
    piecewise = "piecewise"


class Decay(StrEnum):
    """How a value goes from one to the next."""

    linear = "linear"
    sqrt = "sqrt"  # one minus the square root of the progress
    cosine = "cosine"


class Clock(StrEnum):
    """What positions of a schedule count."""

    updates = "updates"
    tokens = "tokens"  # that went into the model


@dataclass
class PieceConfig:
    """A stretch of a curve, from where the one before ended to ``until``."""

    until: float = MISSING  # position of its end
    value: float = MISSING  # at its end
    shape: Decay | None = None  # of the way there from the value before; null: ``value`` all along


@dataclass
class StageConfig:
    """Smaller batches of a young run, to ``until``."""

    until: float = MISSING  # position of its end
    share: float = MISSING  # of train.global_batch, rounded to whole rows


@dataclass
class ThetaConfig:
    """Another rotary theta from a position on, as a context is extended."""

    start: float = MISSING  # position
    theta: float = MISSING
    kinds: list[str] = field(default_factory=list)  # of layer, whose theta it is; empty: all that have one


@dataclass
class ScheduleConfig:
    """A run's way from warmup to floor, and what changes beside the learning rate.

    Positions are on ``clock``. Those of curves are compared with where an update ends, those of batches and theta with
    where it begins: a piece until 10 covers the updates that end at 10 or before.
    """

    kind: ScheduleKind = MISSING
    warmup: int = MISSING  # updates
    floor: float = MISSING  # last learning rate over the peak; inverse_sqrt: lowest; piecewise: after its last piece
    decay: int = 0  # wsd: updates of the decay
    decay_shape: Decay = Decay.linear  # wsd
    clock: Clock = Clock.updates  # of all positions below
    length: float | None = None  # position of the run's last update, however many it has; null: nothing is stretched
    pieces: list[PieceConfig] = field(default_factory=list)  # piecewise: the learning rate over the peak
    mtp_weight: list[PieceConfig] = field(default_factory=list)  # factors of train.mtp_weight; the last one's stays
    balance_rate: list[PieceConfig] = field(default_factory=list)  # factors of each router's balance_rate; likewise
    batch: list[StageConfig] = field(default_factory=list)  # of fewer rows than train.global_batch, which follows
    theta: list[ThetaConfig] = field(default_factory=list)  # of rotary positions

    def __post_init__(self) -> None:
        check(self.warmup >= 0, "schedule.warmup", self.warmup, "0 or more")
        check(0 <= self.floor <= 1, "schedule.floor", self.floor, "0 to 1")
        check(self.decay >= 0, "schedule.decay", self.decay, "0 or more")
        check(
            self.warmup > 0 or self.kind is not ScheduleKind.inverse_sqrt,
            "schedule.warmup",
            self.warmup,
            "1 or more where kind is inverse_sqrt: the peak is at its end",
        )
        length = self.length
        check(length is None or 0 < length < math.inf, "schedule.length", length, "above 0 and finite, or null")
        piecewise = self.kind is ScheduleKind.piecewise
        allowed = "at least one piece where kind is piecewise" if piecewise else f"[] where kind is {self.kind}"
        check(bool(self.pieces) == piecewise, "schedule.pieces", len(self.pieces), allowed)
        for key in ("pieces", "mtp_weight", "balance_rate"):
            curve: list[PieceConfig] = getattr(self, key)
            _check_positions(f"schedule.{key}", "until", [piece.until for piece in curve], after=0)
            for i, piece in enumerate(curve):
                check(0 <= piece.value < math.inf, f"schedule.{key}[{i}].value", piece.value, "0 or more, and finite")
        _check_positions("schedule.batch", "until", [stage.until for stage in self.batch], after=0)
        for i, stage in enumerate(self.batch):
            check(0 < stage.share < math.inf, f"schedule.batch[{i}].share", stage.share, "above 0, and finite")
            inside = length is None or stage.until < length
            check(inside, f"schedule.batch[{i}].until", stage.until, f"less than schedule.length ({length})")
        _check_positions("schedule.theta", "start", [change.start for change in self.theta], after=-1)
        for i, change in enumerate(self.theta):
            check(0 < change.theta < math.inf, f"schedule.theta[{i}].theta", change.theta, "above 0, and finite")


def _check_positions(key: str, name: str, positions: Sequence[float], *, after: float) -> None:
    """Each is beyond the one before.

    Raises:
        ValueError: one is not.
    """
    for i, position in enumerate(positions):
        check(after < position < math.inf, f"{key}[{i}].{name}", position, f"above {after:g}, and finite")
        after = position
