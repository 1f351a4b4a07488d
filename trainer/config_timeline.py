"""How many rows an update has and where on the clock it lies: pure functions of its number, without torch."""

import itertools
import math
from dataclasses import dataclass
from typing import Self

from trainer.config_check import check
from trainer.config_schedule import Clock, ScheduleConfig


@dataclass(frozen=True)
class Timeline:
    """The updates of one run.

    Attributes:
        steps: updates of the whole run.
        rows: of an update, once the run is no longer young.
        ramp: (updates, rows) of the stages before, in order. Example: ramp ((2, 4),) and rows 8 is 4 4 8 8 8 …
        seq_len: tokens of a row.
        clock: what positions count.
        length: position of the end of the last update; None: what the clock counts.
    """

    steps: int
    rows: int = 1
    ramp: tuple[tuple[int, int], ...] = ()
    seq_len: int = 1
    clock: Clock = Clock.updates
    length: float | None = None

    @classmethod
    def of(cls, config: ScheduleConfig, *, steps: int, global_batch: int, seq_len: int) -> Self:
        """Lay out a run.

        Raises:
            ValueError: a stage has less than one row.
        """
        ramp = stages(config, steps=steps, global_batch=global_batch, seq_len=seq_len)
        return cls(steps, global_batch, ramp, seq_len, config.clock, config.length)

    def batch(self, step: int) -> int:
        """Rows of update ``step``, from 0."""
        for updates, rows in self.ramp:
            if step < updates:
                return rows
            step -= updates
        return self.rows

    def before(self, step: int) -> int:
        """Rows of the first ``step`` updates together."""
        total = 0
        for updates, rows in self.ramp:
            total += min(step, updates) * rows
            step -= min(step, updates)
        return total + step * self.rows

    def position(self, step: int) -> float:
        """Where the first ``step`` updates end."""
        if self.length is None:
            return self._counted(step)
        return self.length * (self._counted(step) / self._counted(self.steps))

    def _counted(self, step: int) -> float:
        return float(step if self.clock is Clock.updates else self.before(step) * self.seq_len)


def stages(config: ScheduleConfig, *, steps: int, global_batch: int, seq_len: int) -> tuple[tuple[int, int], ...]:
    """(updates, rows) of the stages of a batch ramp, less those that no update falls into.

    Absolute positions: a stage has as many updates as it takes to reach its end. Under ``schedule.length``, its share
    of the length. Example, on the clock of tokens: until 4 of 12 with half the rows, ten updates: the stage takes
    4 / 0.5 = 8 parts of time and the rest (12 - 4) / 1 = 8, hence five updates each.

    Raises:
        ValueError: a stage has less than one row.
    """
    tokens = config.clock is Clock.tokens
    rows = [round(stage.share * global_batch) for stage in config.batch]
    for i, (stage, n) in enumerate(zip(config.batch, rows, strict=True)):
        allowed = f"enough for one row of train.global_batch ({global_batch})"
        check(n >= 1, f"schedule.batch[{i}].share", stage.share, allowed)
    ends = [stage.until for stage in config.batch]
    if config.length is None:
        counts, reached = [], 0.0
        for end, n in zip(ends, rows, strict=True):
            each = n * seq_len if tokens else 1
            counts.append(max(math.ceil((end - reached) / each), 0))
            reached += counts[-1] * each
    else:
        spans = [end - begin for begin, end in itertools.pairwise([0.0, *ends, config.length])]
        times = [span / (n if tokens else 1) for span, n in zip(spans, [*rows, global_batch], strict=True)]
        bounds = [round(steps * each / sum(times)) for each in itertools.accumulate(times)][:-1]
        counts = [end - begin for begin, end in itertools.pairwise([0, *bounds])]
    return tuple((count, n) for count, n in zip(counts, rows, strict=True) if count)


def steps_to(config: ScheduleConfig, *, global_batch: int, seq_len: int) -> int | None:
    """Updates that reach ``schedule.length`` without stretching anything; None without a length."""
    if config.length is None:
        return None
    if config.clock is Clock.updates:
        return round(config.length)
    ends = [0.0, *(stage.until for stage in config.batch), config.length]
    shares = [*(stage.share for stage in config.batch), 1.0]
    sizes = [max(round(share * global_batch), 1) * seq_len for share in shares]
    spans = itertools.pairwise(ends)
    return round(sum((end - begin) / size for (begin, end), size in zip(spans, sizes, strict=True)))
