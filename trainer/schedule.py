"""Learning rates as pure functions of the update."""

import math

from trainer.config import Decay, ScheduleConfig, ScheduleKind


def factor(config: ScheduleConfig, *, step: int, steps: int) -> float:
    """What multiplies the peak learning rate.

    Args:
        config: the shape.
        step: the update, from 0.
        steps: updates of the whole run.

    Returns:
        1/warmup at the first of ``warmup`` updates, 1 at the last of them, and ``config.floor`` at the last of all.
        A decay longer than what the warmup leaves takes what is left.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    room = steps - config.warmup
    length = room if config.kind is ScheduleKind.cosine else min(config.decay, room)
    into = step + 1 - (steps - length)  # updates into the decay, 1 to length
    if into <= 0:
        return 1.0
    return config.floor + (1 - config.floor) * _remaining(config, min(into / length, 1.0))


def _remaining(config: ScheduleConfig, progress: float) -> float:
    """What is left of the way from peak to floor, 1 to 0."""
    if config.kind is ScheduleKind.cosine:
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.decay_shape is Decay.sqrt:
        return 1 - math.sqrt(progress)  # arXiv 2405.18392, section 4.1
    return 1 - progress
