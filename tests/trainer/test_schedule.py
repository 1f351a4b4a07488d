import math

import pytest

from data.ramp import Cuts
from trainer.config_schedule import (
    Clock,
    Decay,
    PieceConfig,
    ScheduleConfig,
    ScheduleKind,
    StageConfig,
    ThetaConfig,
)
from trainer.config_timeline import Timeline
from trainer.schedule import Schedule, along, factor
from trainer.schedule_command import CONF, Sizes, lay_out, main


def curve(steps, **kwargs):
    config = ScheduleConfig(**kwargs)
    line = Timeline.of(config, steps=steps, global_batch=1, seq_len=1)
    return [factor(config, step=step, timeline=line) for step in range(steps)]


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
    for kind in set(ScheduleKind) - {ScheduleKind.piecewise}:
        assert curve(3, kind=kind, warmup=6, floor=0.1, decay=2) == [1 / 6, 2 / 6, 3 / 6]


def test_a_decay_that_does_not_fit_takes_what_the_warmup_leaves():
    values = curve(10, kind=ScheduleKind.wsd, warmup=4, floor=0.0, decay=20)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])


def test_linear_goes_straight_from_the_peak_to_the_floor():
    values = curve(12, kind=ScheduleKind.linear, warmup=2, floor=0.5)
    assert values[1:] == pytest.approx([1 - 0.05 * i for i in range(11)])


def test_inverse_sqrt_is_one_at_the_end_of_the_warmup_and_half_at_four_times_it():
    values = curve(200, kind=ScheduleKind.inverse_sqrt, warmup=4, floor=0.25)
    assert values[2:5] == [0.75, 1.0, math.sqrt(4 / 5)]
    assert values[15] == 0.5
    assert values[64:] == [0.25] * 136


def test_cosine_keeps_its_bits():
    # what a schedule gave before there were others, to the last bit
    values = curve(7, kind=ScheduleKind.cosine, warmup=2, floor=0.1)
    assert values == [0.5, 1.0] + [0.1 + (1 - 0.1) * (0.5 * (1 + math.cos(math.pi * (i / 5)))) for i in range(1, 6)]


def pieces(*ends):
    return [PieceConfig(until=until, value=value, shape=shape) for until, value, shape in ends]


def test_a_curve_holds_and_goes_from_piece_to_piece():
    way = pieces((4, 1.0, None), (8, 0.5, Decay.linear))
    assert [along(way, at=at, begin=0, rest=0.1) for at in (2, 4, 6, 8, 9)] == [1.0, 1.0, 0.75, 0.5, 0.1]


@pytest.mark.parametrize("shape, middle", [(Decay.linear, 0.6), (Decay.sqrt, 1 - 0.8 * 0.5**0.5), (Decay.cosine, 0.6)])
def test_a_piece_goes_its_way_in_its_shape(shape, middle):
    assert along(pieces((2, 0.2, shape)), at=1, begin=0, rest=0.0) == pytest.approx(middle)


def test_a_piece_begins_where_the_warmup_ends():
    way = pieces((6, 0.0, Decay.linear))
    values = curve(8, kind=ScheduleKind.piecewise, warmup=2, floor=0.0, pieces=way)
    assert values == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0])


def test_a_piece_that_the_warmup_covers_is_passed_over():
    way = pieces((2, 0.5, None), (8, 0.0, Decay.linear))
    values = curve(8, kind=ScheduleKind.piecewise, warmup=4, floor=0.0, pieces=way)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.375, 0.25, 0.125, 0.0])


def test_a_length_stretches_every_position_over_the_run():
    way = pieces((10, 1.0, None), (14, 0.5, None))
    config = {"kind": ScheduleKind.piecewise, "warmup": 0, "floor": 0.25, "pieces": way}
    assert curve(32, **config, length=16.0) == [1.0] * 20 + [0.5] * 8 + [0.25] * 4
    assert curve(16, **config) == [1.0] * 10 + [0.5] * 4 + [0.25] * 2


def test_stages_of_tokens_last_until_enough_were_read():
    config = cosine(batch=[StageConfig(until=100, share=0.25), StageConfig(until=300, share=0.5)], clock=Clock.tokens)
    line = Timeline.of(config, steps=20, global_batch=8, seq_len=10)
    # 20 tokens an update up to 100, then 40 up to 300, then 80
    assert line.ramp == ((5, 2), (5, 4))
    assert [line.position(step) for step in (0, 5, 10, 11)] == [0, 100, 300, 380]


def test_stages_under_a_length_take_their_share_of_the_tokens():
    config = cosine(batch=[StageConfig(until=4, share=0.5)], clock=Clock.tokens, length=12.0)
    line = Timeline.of(config, steps=10, global_batch=8, seq_len=10)
    assert line.ramp == ((5, 4),)
    assert line.position(5) == pytest.approx(4) and line.position(10) == 12.0


def test_a_stage_too_short_for_an_update_has_none():
    config = cosine(batch=[StageConfig(until=1, share=0.5)], clock=Clock.tokens, length=1000.0)
    assert Timeline.of(config, steps=10, global_batch=8, seq_len=10).ramp == ()


@pytest.mark.parametrize("ramp", [(), ((3, 1),), ((2, 2), (1, 3)), ((1, 8), (4, 4))])
def test_trainer_and_loader_count_rows_alike(ramp):
    line, cuts = Timeline(20, 4, ramp), Cuts(4, ramp)
    assert [line.batch(i) for i in range(20)] == [cuts.size(i) for i in range(20)]
    assert [line.before(i) for i in range(20)] == [cuts.first(i) for i in range(20)]
    assert [cuts.first(i) + cuts.size(i) for i in range(20)] == [cuts.first(i + 1) for i in range(20)]


def cosine(**more):
    return ScheduleConfig(kind=ScheduleKind.cosine, warmup=0, floor=0.0, **more)


def test_deepseek_v3_has_its_published_plateaus():
    sizes = Sizes(steps=None, global_batch=None, seq_len=None)
    schedule = lay_out("deepseek_v3", changes=[], sizes=sizes)
    line = schedule.timeline
    assert line.rows == 15360 and [rows for _, rows in line.ramp] == [3072, 6144, 9216, 12288]
    steps = {at: next(i for i in range(0, line.steps, 50) if line.position(i) > at * 1e12) for at in (5, 14.4, 14.7)}
    assert [schedule.at(step).lr * 2.2e-4 for step in steps.values()] == pytest.approx([2.2e-4, 2.2e-5, 7.3e-6])
    assert [0.3 * schedule.at(step).mtp_weight for step in steps.values()] == pytest.approx([0.3, 0.1, 0.1])
    assert [schedule.at(step).balance_rate for step in steps.values()] == [1.0, 0.0, 0.0]


def test_a_change_of_theta_begins_with_the_update_at_its_start():
    config = cosine(theta=[ThetaConfig(start=0, theta=2.0), ThetaConfig(start=3, theta=5.0)])
    schedule = Schedule(config, Timeline(5))
    assert [schedule.at(step).theta for step in range(5)] == [1, 1, 1, 2, 2]


def test_every_schedule_is_drawn(tmp_path, capsys):
    names = sorted(path.stem for path in (CONF / "schedule").glob("*.yaml"))
    out = tmp_path / "all.png"
    assert main([*names, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == names


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "SCHEDULE=none: must be one or more of "),
        (["cosin"], "did you mean cosine?"),
        (["wsd", "schedule.warmup=x"], "schedule.warmup: Value 'x'"),
        (["wsd", "schedule.decoy=1"], "schedule.decoy: Key 'decoy' not in"),
        (["wsd", "schedule.floor=2"], "schedule.floor=2.0: must be 0 to 1"),
        (["wsd", "warmup=2"], "words=warmup=2: must be"),
        (["wsd", "--steps", "0"], "--steps=0: must be above 0"),
        (["wsd", "--stops"], "unrecognized arguments: --stops"),
        (["wsd", "--out", "/proc/none/x.png"], "cannot write /proc/none"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(words, said, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out
