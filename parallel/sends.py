"""States and gradients that stages send to other ranks, each held only until it must have been received.

torch's runtime waits for all sends at the end of an update, and until then keeps what every micro-batch sent. Whoever
waits earlier must not wait for a rank that waits for him: so for what has been sent before the other did something that
is known to be done, since its result is here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch.distributed as dist
from torch.distributed.pipelining.schedules import _Action, _batch_p2p, _ComputationType

F, RECV_F, SEND_F = _ComputationType.FORWARD, _ComputationType.RECV_F, _ComputationType.SEND_F
B, RECV_B, SEND_B = _ComputationType.FULL_BACKWARD, _ComputationType.RECV_B, _ComputationType.SEND_B

Event = tuple[int, _ComputationType, int | None]
"""Something of a stage and a micro-batch; B stands for a whole backward and for the part of it for the input."""


def receipts(
    orders: Mapping[int, Sequence[_Action]], *, rank: int, rank_of: Callable[[int], int]
) -> dict[Event, list[Event]]:
    """Which sends of a rank the other has begun to receive when a forward or backward has all that it needs.

    What another rank sent tells that it began all receives that come earlier in its order.

    Example: two ranks under 1f1b. Rank 1 receives states 0, and sends their gradient when it has it: when that is at
    rank 0, which needs it for its backward 0, the send of states 0 is over.

    Args:
        orders: what each rank does, sends and receives among it.
        rank: whose sends.
        rank_of: of a stage.
    """
    places = {other: {_event(action): place for place, action in enumerate(order)} for other, order in orders.items()}
    under_way: list[tuple[Event, int, int]] = []  # a send, to whom, and where in their order they receive it
    found: dict[Event, list[Event]] = {}
    for action in orders[rank]:
        if action.computation_type in (SEND_F, SEND_B):
            stage, kind, i = _event(action)
            theirs = (stage + 1, RECV_F, i) if kind is SEND_F else (stage - 1, RECV_B, i)
            to = rank_of(theirs[0])
            under_way.append(((stage, kind, i), to, places[to][theirs]))
        for part in action.sub_actions or (action,):
            stage, kind, i = _event(part)
            needed = {F: (stage - 1, SEND_F, i), B: (stage + 1, SEND_B, i)}.get(kind)
            if needed is None or (stage, RECV_F if kind is F else RECV_B, i) not in places[rank]:
                continue
            sender = rank_of(needed[0])
            over = [send for send, to, place in under_way if to == sender and place < places[sender][needed]]
            under_way = [each for each in under_way if each[0] not in over]
            found[stage, kind, i] = over
    return found


def _event(action: _Action) -> Event:
    kind = B if action.computation_type is _ComputationType.BACKWARD_INPUT else action.computation_type
    return action.stage_index, kind, action.microbatch_index


class Sends:
    """What one rank has sent and not yet waited for."""

    def __init__(self, over: Mapping[Event, Iterable[Event]]) -> None:
        """Take what ``receipts`` gives."""
        self._over = over
        self._held: dict[Event, tuple[list[dist.P2POp], list[dist.Work]]] = {}

    def post(self, event: Event, operations: list[dist.P2POp]) -> None:
        """Begin to send, and hold what is sent (over pp)."""
        self._held[event] = operations, _batch_p2p(operations)

    def release(self, event: Event) -> None:
        """Wait for what must have been received when this has all that it needs, and hold it no longer."""
        for each in self._over.get(event, ()):
            self._wait(each)

    def finish(self) -> None:
        """Wait for all."""
        for each in list(self._held):
            self._wait(each)

    def _wait(self, event: Event) -> None:
        for work in self._held.pop(event)[1]:
            work.wait()
