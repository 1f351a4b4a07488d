"""Which updates are outliers, by a rule written out and by OLMo-core's arithmetic."""

import math

import pytest
import torch

from trainer.config_outliers import OutliersConfig
from trainer.guard import PATIENCE, Guard, excess
from trainer.state import History, State

RULE = OutliersConfig(sigma=2, window=4)


def judged(guard, losses, norms=None):
    norms = losses if norms is None else norms
    pairs = enumerate(zip(losses, norms, strict=True), start=1)
    return [guard.judge(step=step, loss=loss, norm=norm) for step, (loss, norm) in pairs]


@pytest.mark.parametrize("value, past, found", [(5, [1, 2, 3], True), (4, [1, 2, 3], False), (-9, [1, 2, 3], False)])
def test_the_example_of_the_docstring_holds(value, past, found):
    assert (excess(value, past, rule=RULE) is not None) == found


def olmo(values, rule):
    """Steps that OLMo-core's optimizer skips for one series: its deque of window + 1, std_mean and one-sided test."""
    skipped = []
    for i in range(len(values)):
        kept = torch.tensor(values[max(0, i - rule.window) : i + 1], dtype=torch.float64)
        if len(kept) < max(2, rule.window // 2) or len(kept) < 3:
            continue
        std, mean = torch.std_mean(kept[:-1])
        if not kept[-1] - mean <= rule.sigma * std:
            skipped.append(i)
    return skipped


@pytest.mark.parametrize("sigma, window", [(1, 4), (2, 8), (1.5, 21), (3, 128)])
def test_outliers_are_those_of_olmo_core(sigma, window):
    rule = OutliersConfig(sigma=sigma, window=window)
    losses, norms = torch.randn(2, 300, generator=torch.Generator().manual_seed(window), dtype=torch.float64).tolist()
    guard = Guard(rule, skips=True, history=History())
    skipped = [i for i, verdict in enumerate(judged(guard, losses, norms)) if verdict.skips]
    assert skipped == sorted({*olmo(losses, rule), *olmo(norms, rule)})
    assert 0 < len(skipped) < 150 or sigma == 3
    assert guard.history.losses == losses[-window:] and guard.history.norms == norms[-window:]


def test_an_outlier_is_told_of_where_nothing_is_skipped():
    verdicts = judged(Guard(RULE, skips=False, history=History()), [1.0, 3.0, 2.0, 9.0], [1.0, 1.1, 0.9, 1.0])
    assert [bool(verdict.outliers) for verdict in verdicts] == [False, False, False, True]
    assert not any(verdict.skips for verdict in verdicts)
    (found,) = verdicts[-1].outliers.items()
    assert found[0] == "loss" and (found[1].value, found[1].mean, found[1].std) == (9.0, 2.0, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_whose_numbers_are_lost_ends_unless_updates_are_skipped(bad):
    for numbers, key in (((bad, 1.0), "loss"), ((1.0, bad), "grad_norm")):
        loss, norm = numbers
        verdict = Guard(RULE, skips=False, history=History()).judge(step=7, loss=loss, norm=norm)
        assert verdict.ends == f"step 7: {key} is {bad}; no checkpoint was made of it" and not verdict.skips
        guard = Guard(RULE, skips=True, history=History())
        judged(guard, [1.0, 2.0, 3.0])
        verdict = guard.judge(step=4, loss=loss, norm=norm)
        assert verdict.skips and verdict.lost == [key] and verdict.ends is None and verdict.notable
        assert guard.history.losses == [1.0, 2.0, 3.0]  # a window with a nan in it would judge everything so


def test_patience_ends():
    guard = Guard(RULE, skips=True, history=History())
    verdicts = judged(guard, [math.nan] * PATIENCE + [1.0] + [math.nan] * (PATIENCE + 1))
    assert [verdict.ends is None for verdict in verdicts] == [True] * (2 * PATIENCE + 1) + [False]
    assert "nor of the 8 skipped before it" in verdicts[-1].ends


def test_a_state_stored_before_there_was_a_history_is_read():
    assert State.from_plain({"step": 3, "tokens": 5}) == State(3, 5)
    plain = {"step": 3, "tokens": 5, "skipped": 1, "history": {"losses": [1.0], "norms": [2.0], "lost": 0}}
    assert State.from_plain(plain) == State(3, 5, 1, History([1.0], [2.0]))


@pytest.mark.parametrize("sigma, window, key", [(0, 8, "sigma"), (math.inf, 8, "sigma"), (1, 3, "window")])
def test_a_rule_that_makes_no_sense_is_refused(sigma, window, key):
    with pytest.raises(ValueError, match=f"^{key}="):
        OutliersConfig(sigma=sigma, window=window)
