"""The report of an update that stands out: what has grown, where it is kept."""

import json
import math

import pytest

from trainer.config_outliers import OutliersConfig
from trainer.guard import Guard
from trainer.spikes import FILE, Spikes, layer
from trainer.state import History

RULE = OutliersConfig(sigma=6, window=8)
BLOCKS = ["blocks.0.mixer.wq.weight", "blocks.0.mlp.up.weight", "blocks.10.mixer.wq.weight"]
NAMES = ["embed.weight", *BLOCKS, "norm.weight"]
QUIET = [1.0, 4.0, 9.0, 0.0, 16.0]


def opened(folder, history, *, step=0, writes=True):
    given = {"window": RULE.window, "history": history, "folder": folder, "writes": writes, "step": step}
    return Spikes(NAMES, rows=lambda batch: range(4 * batch, 4 * batch + 4), **given)


def note(spikes, guard, *, step, squares, loss=2.0):
    norm = math.sqrt(math.fsum(squares))
    return spikes.note(guard.judge(step=step, loss=loss, norm=norm), step=step, loss=loss, squares=squares)


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


@pytest.mark.parametrize(
    "name, of",
    [
        ("blocks.3.mlp.up.weight", "blocks.3"),
        ("mtp.0.block.mixer.wq.weight", "mtp.0"),
        ("embed.weight", "embed"),
        ("norm.weight", "norm"),
    ],
)
def test_a_parameter_is_of_a_layer(name, of):
    assert layer(name) == of


def test_what_has_grown_most_is_named_first(tmp_path):
    history = History()
    guard, spikes = Guard(RULE, skips=False, history=history), opened(tmp_path, history)
    for step in range(1, 7):
        wobble = [each * (1 + 0.01 * (step % 3)) for each in QUIET]
        assert note(spikes, guard, step=step, squares=wobble) is None
    assert not (tmp_path / FILE).exists() and history.seen == 6
    usual = list(history.usual)
    told = note(spikes, guard, step=7, squares=[4.0, 4.0, 90000.0, 0.0, 16.0])
    (report,) = lines(tmp_path)
    assert [line["name"] for line in report["layers"]] == ["blocks.0", "embed"]
    assert report["layers"][0]["growth"] == pytest.approx(math.sqrt(90004 / 13), rel=0.02)
    assert report["layers"][0]["most"] == "blocks.0.mlp.up.weight"
    assert [line["name"] for line in report["parameters"]] == ["blocks.0.mlp.up.weight", "embed.weight"]
    assert report["outliers"].keys() == {"grad_norm"} and not report["skipped"]
    assert (report["step"], report["batch"], report["rows"]) == (7, 6, [24, 28])
    assert told.startswith("step 7 stands out: gradient norm 300 is 54.")
    assert "most grown: blocks.0.mlp.up.weight (9" in told and told.endswith("x), embed.weight (1.99x); batch 6")
    assert history.usual == usual  # or the next one would look small


def test_running_means_are_means_at_first(tmp_path):
    history = History()
    spikes, guard = opened(tmp_path, history), Guard(RULE, skips=False, history=History())
    for step in (1, 2, 3):
        note(spikes, guard, step=step, squares=[float(step**2), 0, 0, 0, 0])
    assert history.usual[0] == pytest.approx(2.0)


def test_gradients_that_are_no_number_are_named(tmp_path):
    history = History()
    spikes, guard = opened(tmp_path, history), Guard(RULE, skips=True, history=history)
    told = note(spikes, guard, step=1, squares=[1.0, 1.0, math.nan, math.inf, 1.0])
    assert told == "step 1 was skipped: gradients that are no number: blocks.0.mlp.up.weight and 1 more; batch 0"
    assert lines(tmp_path)[0]["not_finite"] == ["blocks.0.mlp.up.weight", "blocks.10.mixer.wq.weight"]
    told = note(spikes, guard, step=2, squares=QUIET, loss=math.nan)
    assert told == "step 2 was skipped: the loss is no number; batch 1"


def test_a_restart_cuts_what_is_past_it_and_other_ranks_write_nothing(tmp_path):
    history = History()
    spikes, guard = opened(tmp_path, history), Guard(RULE, skips=True, history=history)
    for step in (1, 2, 3):
        note(spikes, guard, step=step, squares=[math.nan] * 5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    again = opened(tmp_path, history, step=1)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    other = opened(tmp_path, history, step=0, writes=False)
    assert note(other, guard, step=4, squares=[math.nan] * 5) is not None
    assert [line["step"] for line in lines(tmp_path)] == [1]
    note(again, guard, step=2, squares=[math.nan] * 5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
