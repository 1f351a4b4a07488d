import math

import pytest

from trainer.config import Decay, ScheduleConfig, ScheduleKind
from trainer.schedule import factor


def curve(steps, **kwargs):
    config = ScheduleConfig(**kwargs)
    return [factor(config, step=step, steps=steps) for step in range(steps)]


def test_warmup_rises_evenly_to_the_peak():
    assert curve(10, kind=ScheduleKind.cosine, warmup=4, floor=0.1)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_ends_at_the_floor():
    values = curve(100, kind=ScheduleKind.cosine, warmup=20, floor=0.1)
    assert values[-1] == pytest.approx(0.1)
    assert values[59] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 40 / 80)))
    assert values[20:] == sorted(values[20:], reverse=True)


@pytest.mark.parametrize("shape, middle", [(Decay.linear, 0.5), (Decay.sqrt, 1 - math.sqrt(0.5))])
def test_wsd_stays_and_then_decays(shape, middle):
    values = curve(100, kind=ScheduleKind.wsd, warmup=10, floor=0.0, decay=20, decay_shape=shape)
    assert values[9:80] == [1.0] * 71
    assert values[89] == pytest.approx(middle)
    assert values[-1] == 0.0


def test_no_warmup_starts_at_the_peak():
    assert curve(5, kind=ScheduleKind.wsd, warmup=0, floor=0.0, decay=0) == [1.0] * 5


def test_a_run_shorter_than_its_warmup_only_rises():
    for kind in ScheduleKind:
        assert curve(3, kind=kind, warmup=6, floor=0.1, decay=2) == [1 / 6, 2 / 6, 3 / 6]


def test_a_decay_that_does_not_fit_takes_what_the_warmup_leaves():
    values = curve(10, kind=ScheduleKind.wsd, warmup=4, floor=0.0, decay=20)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])
