"""Orders of micro-batches through stages, checked and timed on paper."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.config import ScheduleName
from parallel.partition import rank_of
from parallel.schedule import BOTH, SPLIT, B, F, I, Malformed, W, orders, simulate

ONE, LOOP, ZBV, DUAL = (ScheduleName(name) for name in ("1f1b", "interleaved", "zbv", "dualpipev"))
COSTS = {F: 1, B: 2, I: 1, W: 1}


def timed(schedule, *, pp, n, virtual=2, costs=COSTS):
    stages = pp * {ONE: 1, LOOP: virtual}.get(schedule, 2)
    return simulate(orders(schedule, pp=pp, virtual=virtual, n=n), costs=costs, n_stages=stages, n=n)


@given(st.sampled_from(list(ScheduleName)), st.integers(1, 6), st.integers(1, 4), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_any_number_of_micro_batches_goes_through_any_number_of_stages(schedule, pp, virtual, n):
    order = orders(schedule, pp=pp, virtual=virtual, n=n)
    assert len(order) == pp
    timed(schedule, pp=pp, n=n, virtual=virtual)  # it ends, with each action once and after what it needs
    for rank, actions in enumerate(order):
        parts = [part for action in actions for part in (action.sub_actions or (action,))]
        assert all(rank_of(part.stage_index, schedule, pp=pp) == rank for part in parts)
        assert schedule in SPLIT or {part.computation_type for part in parts} == {F, B}


def test_one_forward_one_backward_on_two_ranks():
    order = orders(ONE, pp=2, virtual=1, n=3)
    assert [[str(action) for action in rank] for rank in order] == [
        ["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"],
        ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"],
    ]


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("backward", [1, 2, 2.5])
def test_one_forward_one_backward_idles_as_published(pp, backward):
    for n in (pp, 2 * pp, 5 * pp + 1):
        time = timed(ONE, pp=pp, n=n, costs={F: 1, B: backward})
        assert time.bubble == pytest.approx((pp - 1) / (n + pp - 1))  # arXiv 2104.04473, section 2.2.1
        held = [_held(actions) for actions in orders(ONE, pp=pp, virtual=1, n=n)]
        assert held == [min(n, pp - rank) for rank in range(pp)]


def _held(actions):
    """The most micro-batches that are forward and not yet backward, over the stages of a rank."""
    now = most = 0
    for action in (part for each in actions for part in (each.sub_actions or (each,))):
        now += {F: 1, B: -1, I: 0, W: -1}[action.computation_type]
        most = max(most, now)
    return most


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_interleaved_stages_idle_as_published(pp, virtual):
    for n in (pp, 2 * pp, 4 * pp):
        time = timed(LOOP, pp=pp, n=n, virtual=virtual)
        assert time.bubble == pytest.approx((pp - 1) / (virtual * n + pp - 1))  # arXiv 2104.04473, section 2.2.2


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_in_a_v_with_equal_costs_no_rank_waits_once_it_has_begun(pp):
    for n in (2 * pp - 1, 2 * pp, 5 * pp):
        time = timed(ZBV, pp=pp, n=n)
        assert time.waits == [0] * pp  # arXiv 2401.10241, section 6
        assert time.length == 6 * n + pp - 1
    assert max(timed(ZBV, pp=pp, n=pp).waits) > 0 or pp == 1


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("both", [3, 2.5])
def test_dualpipev_idles_as_published(pp, both):
    for n in (2 * pp, 3 * pp, 6 * pp):
        time = timed(DUAL, pp=pp, n=n, costs=COSTS | {BOTH: both})
        published = (pp - 1) * (both + COSTS[B] - 3 * COSTS[W])  # README of deepseek-ai/DualPipe, pp ranks, 2 pp stages
        assert max(time.idle) == pytest.approx(published), (n, time)
        # torch's runtime runs the two of a pair one after the other: then nothing waits for both.
        assert timed(DUAL, pp=pp, n=n).idle == [pp - 1] * pp


def test_what_cannot_run_is_told():
    order = orders(ONE, pp=2, virtual=1, n=2)
    wrong = [order[0], [order[1][1], order[1][0], *order[1][2:]]]  # backward before forward
    with pytest.raises(Malformed, match="nobody can go on"):
        simulate(wrong, costs=COSTS, n_stages=2, n=2)
    with pytest.raises(Malformed, match="left out"):
        simulate(order, costs=COSTS, n_stages=2, n=3)
    with pytest.raises(Malformed, match="twice"):
        simulate([order[0] + order[0][:1], order[1]], costs=COSTS, n_stages=2, n=2)
