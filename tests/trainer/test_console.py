"""What a person sees of a run's progress."""

import io

import pytest
from rich.console import Console

from trainer.console import Progress, clock, describe

ROW = {"step": 120.0, "loss": 4.3124, "tokens_per_second": 5120.4}


def test_a_line_says_where_the_run_is_and_when_it_ends():
    row = {**ROW, "expert_load_max": 1.306}
    line = describe(row, total=1200, validation=4.4551, left=125.2)
    assert line == "step  120/1200  loss 4.312  val 4.455  5,120 tokens/s  fullest expert 1.31x  left 02:05"


def test_what_is_not_known_is_left_out():
    assert describe(ROW, total=600, validation=None, left=None) == "step 120/600  loss 4.312  5,120 tokens/s"


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "00:00"), (59.6, "01:00"), (125.2, "02:05"), (3661, "1:01:01")])
def test_clock_rounds_to_seconds(seconds, shown):
    assert clock(seconds) == shown


def test_a_pipe_gets_plain_lines_for_the_first_update_evaluations_and_the_last():
    out = io.StringIO()
    progress = Progress(total=50, every=3600, console=Console(file=out, force_terminal=False, width=40))
    for step in range(1, 51):
        row = {"step": float(step), "loss": 2.0, "tokens_per_second": 10.0}
        progress.update(row | ({"val_loss": 3.0} if step == 20 else {}))
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/50", "20/50", "50/50"]
    assert "val" not in lines[0]
    assert "val 3.000" in lines[2]
    assert "left 00:00" in lines[2]
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_one_line_that_changes_and_keeps_the_last():
    out = io.StringIO()
    progress = Progress(total=3, every=3600, console=Console(file=out, force_terminal=True, width=100))
    for step in range(1, 4):
        progress.update({"step": float(step), "loss": 2.0, "tokens_per_second": 10.0})
    progress.say("text of its own")
    progress.close()
    shown = out.getvalue()
    assert "\x1b[2K" in shown  # erases the line before it draws it anew
    assert "text of its own" in shown
    assert "step 3/3" in shown
