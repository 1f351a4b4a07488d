"""What an update is made with, as pure functions of its number; ``python -m trainer.schedule`` draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.config_schedule import Decay, PieceConfig, ScheduleConfig, ScheduleKind
from trainer.config_timeline import Timeline


@dataclass(frozen=True)
class Moment:
    """What a schedule says of one update.

    Attributes:
        lr: factor of the peak learning rate.
        mtp_weight: factor of the weight of multi-token losses.
        balance_rate: factor of the step of routers' biases.
        rows: of the global batch.
        theta: how many changes of the rotary theta have begun.
    """

    lr: float
    mtp_weight: float
    balance_rate: float
    rows: int
    theta: int


@dataclass(frozen=True)
class Schedule:
    """A schedule over one run."""

    config: ScheduleConfig
    timeline: Timeline

    @classmethod
    def of(cls, config: ScheduleConfig, *, train: TrainConfig) -> "Schedule":
        """Lay a schedule over a run.

        Raises:
            ValueError: a stage of its batches has less than one row.
        """
        sizes = {"global_batch": train.global_batch, "seq_len": train.seq_len}
        return cls(config, Timeline.of(config, steps=train.steps, **sizes))

    def at(self, step: int) -> Moment:
        """What update ``step``, from 0, is made with; nothing else decides it."""
        config, line = self.config, self.timeline
        begin, end = line.position(step), line.position(step + 1)
        return Moment(
            lr=factor(config, step=step, timeline=line),
            mtp_weight=_scale(config.mtp_weight, at=end),
            balance_rate=_scale(config.balance_rate, at=end),
            rows=line.batch(step),
            theta=sum(change.start <= begin for change in config.theta),
        )


def factor(config: ScheduleConfig, *, step: int, timeline: Timeline) -> float:
    """What multiplies the peak learning rate.

    Args:
        config: the shape.
        step: the update, from 0.
        timeline: of the run.

    Returns:
        1/warmup at the first of ``warmup`` updates, 1 at the last of them, and ``config.floor`` at the last of all, but
        that inverse_sqrt has it as its lowest and piecewise after its last piece. A decay longer than what the warmup
        leaves takes what is left.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.kind is ScheduleKind.inverse_sqrt:  # arXiv 1706.03762, section 5.3
        return max(config.floor, math.sqrt(config.warmup / (step + 1)))
    if config.kind is ScheduleKind.piecewise:
        begin = timeline.position(config.warmup)
        return along(config.pieces, at=timeline.position(step + 1), begin=begin, rest=config.floor)
    room = timeline.steps - config.warmup
    length = min(config.decay, room) if config.kind is ScheduleKind.wsd else room
    into = step + 1 - (timeline.steps - length)  # updates into the decay, 1 to length
    if into <= 0:
        return 1.0
    shapes = {ScheduleKind.cosine: Decay.cosine, ScheduleKind.linear: Decay.linear}
    shape = shapes.get(config.kind, config.decay_shape)
    return config.floor + (1 - config.floor) * _remaining(shape, min(into / length, 1.0))


def along(pieces: Sequence[PieceConfig], *, at: float, begin: float, rest: float) -> float:
    """The value of a curve that starts at 1.

    Example: until 4 hold 1, until 8 linear to 0.5, rest 0.1, from 0: at 2, 4, 6, 8, 9 it is 1, 1, 0.75, 0.5, 0.1.

    Args:
        pieces: of the curve.
        at: position, after ``begin``.
        begin: where the first piece begins; pieces that end before it are over.
        rest: the value after the last piece.
    """
    value = 1.0
    for piece in pieces:
        if at <= piece.until:
            if piece.shape is None:
                return piece.value
            return piece.value + (value - piece.value) * _remaining(piece.shape, (at - begin) / (piece.until - begin))
        begin, value = max(begin, piece.until), piece.value
    return rest


def _scale(pieces: Sequence[PieceConfig], *, at: float) -> float:
    """A factor that no warmup delays; without pieces 1, after them the last one's value."""
    return along(pieces, at=at, begin=0.0, rest=pieces[-1].value) if pieces else 1.0


def _remaining(shape: Decay, progress: float) -> float:
    """What is left of a way, 1 to 0."""
    if shape is Decay.cosine:
        return 0.5 * (1 + math.cos(math.pi * progress))
    if shape is Decay.sqrt:
        return 1 - math.sqrt(progress)  # arXiv 2405.18392, section 4.1
    return 1 - progress


if __name__ == "__main__":
    from trainer.schedule_command import main

    raise SystemExit(main())
