"""What a rank has sent is held until it must have been received, in any order of micro-batches."""

from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _add_send_recv

from parallel.config import ScheduleName
from parallel.partition import rank_of
from parallel.schedule import orders
from parallel.sends import RECV_B, RECV_F, SEND_B, SEND_F, B, F, _event, receipts


def lowered(schedule, *, pp, n):
    """Orders with sends and receives, and of each rank which sends are over when."""
    to_rank = partial(rank_of, schedule=schedule, pp=pp)
    order = dict(enumerate(orders(schedule, pp=pp, virtual=2, n=n)))
    found = _add_send_recv(order, stage_to_rank=to_rank, num_stages=pp * (1 if schedule == "1f1b" else 2))
    return found, [receipts(found, rank=rank, rank_of=to_rank) for rank in range(pp)]


def parts(action):
    return [_event(part) for part in action.sub_actions or (action,)]


@given(st.sampled_from(list(ScheduleName)), st.integers(2, 6), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_nobody_waits_for_a_send_that_its_receiver_has_not_reached(schedule, pp, n):
    order, over = lowered(schedule, pp=pp, n=n)
    begun = set()  # sends and receives, of all ranks
    places, progress = [0] * pp, True
    while progress:
        progress = False
        for rank in range(pp):
            while places[rank] < len(order[rank]):
                needs, action = [], order[rank][places[rank]]
                for stage, kind, i in parts(action):
                    if (stage, RECV_F, i) in begun and kind is F:
                        needs.append((stage - 1, SEND_F, i))
                    if (stage, RECV_B, i) in begun and kind is B:
                        needs.append((stage + 1, SEND_B, i))
                if not begun.issuperset(needs):
                    break
                for event in parts(action):
                    for stage, kind, i in over[rank].get(event, []):
                        assert (stage, kind, i) in begun, "it was sent"
                        theirs = (stage + 1, RECV_F, i) if kind is SEND_F else (stage - 1, RECV_B, i)
                        assert theirs in begun, "they have begun to receive it"
                begun.update(parts(action))
                places[rank], progress = places[rank] + 1, True
    assert places == [len(order[rank]) for rank in range(pp)]
    for rank in range(pp):
        released = [event for events in over[rank].values() for event in events]
        assert len(released) == len({*released}), "nothing is waited for twice"


@given(st.sampled_from(list(ScheduleName)), st.integers(2, 6))
@settings(max_examples=24, deadline=None)
def test_more_micro_batches_hold_no_more_sends(schedule, pp):
    most = []
    for n in (4 * pp, 8 * pp):
        order, over = lowered(schedule, pp=pp, n=n)
        most.append([])
        for rank in range(pp):
            now, peak = 0, 0
            for action in order[rank]:
                now += action.computation_type in (SEND_F, SEND_B)
                now -= sum(len(over[rank].get(event, [])) for event in parts(action))
                peak = max(peak, now)
            most[-1].append(peak)
    assert most[0] == most[1] and max(most[0]) <= 4 * pp
