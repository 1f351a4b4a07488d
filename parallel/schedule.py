"""In which order pipeline stages run micro-batches: data that is checked and timed here, and run by torch's runtime.

Orders of the interleaved, ZBV and DualPipeV schedules are torch's (torch/distributed/pipelining/schedules.py); where it
asks for more micro-batches than there are, the order for that many is made and the surplus left out of it, which leaves
all others in order. Sources: 1F1B and interleaved: Megatron-LM, arXiv 2104.04473, section 2.2; ZBV: Zero Bubble, arXiv
2401.10241, section 6; DualPipeV: github.com/deepseek-ai/DualPipe, after DeepSeek-V3, arXiv 2412.19437, section 3.2.1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleInterleaved1F1B
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import (
    ScheduleZBVZeroBubble,
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from parallel.config import ScheduleName
from parallel.sends import Sends, receipts
from parallel.stage import Stage

Kind = _ComputationType
"""Of an action: F forward; B backward; I the part of it for a stage's input, W for its weights; or F and B at once."""

F, B, I, W, BOTH = Kind.FORWARD, Kind.FULL_BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.OVERLAP_F_B  # noqa: E741

SPLIT = (ScheduleName.zbv, ScheduleName.dualpipev)
"""Schedules that take the backward apart: weights' gradients wait, and fill what would be idle time."""


class Malformed(ValueError):
    """An order that cannot run to its end, or runs something twice, too early or not at all."""


def orders(schedule: ScheduleName, *, pp: int, virtual: int, n: int) -> list[list[_Action]]:
    """What each of ``pp`` ranks runs, in order, to train on ``n`` micro-batches.

    Example: two ranks under 1f1b, two micro-batches: F0 F1 B0 B1 and F0 B0 F1 B1.

    Args:
        schedule: which.
        pp: ranks.
        virtual: stages a rank under interleaved.
        n: micro-batches.
    """
    made = {
        ScheduleName["1f1b"]: _one_f_one_b,
        ScheduleName.interleaved: _interleaved,
        ScheduleName.zbv: _zbv,
        ScheduleName.dualpipev: _dualpipev,
    }[schedule](pp, virtual, n)
    return [[kept for action in rank if action is not None for kept in _among(action, n=n)] for rank in made]


def _among(action: _Action, *, n: int) -> list[_Action]:
    """An action, or what of it is of the first ``n`` micro-batches."""
    if action.sub_actions is None:
        return [action] if action.microbatch_index is not None and action.microbatch_index < n else []
    kept = [part for each in action.sub_actions for part in _among(each, n=n)]
    return [action] if len(kept) == len(action.sub_actions) else kept


def _one_f_one_b(pp: int, virtual: int, n: int) -> list[list[_Action | None]]:
    """Forwards until the first backward can come back, then one of each in turns, then the backwards that are left."""
    made: list[list[_Action | None]] = []
    for rank in range(pp):
        ahead = min(n, pp - 1 - rank)
        turns = [_Action(rank, kind, i + (ahead if kind is F else 0)) for i in range(n - ahead) for kind in (F, B)]
        first = [_Action(rank, F, i) for i in range(ahead)]
        made.append([*first, *turns, *(_Action(rank, B, i) for i in range(n - ahead, n))])
    return made


def _interleaved(pp: int, virtual: int, n: int) -> list[list[_Action | None]]:
    """All stages of a rank take turns, as many micro-batches in a row as there are ranks, or a few more."""
    rounds = max(1, n // pp)
    each = -(-n // rounds)
    state = SimpleNamespace(
        n_local_stages=virtual, pp_group_size=pp, microbatches_per_round=each, _n_microbatches=each * rounds
    )
    return [_computed(ScheduleInterleaved1F1B, state, rank) for rank in range(pp)]


def _zbv(pp: int, virtual: int, n: int) -> list[list[_Action | None]]:
    state = SimpleNamespace(pp_group_size=pp, num_stages=2 * pp, _n_microbatches=max(n, 2 * pp - 1))
    return [_computed(ScheduleZBVZeroBubble, state, rank) for rank in range(pp)]


def _dualpipev(pp: int, virtual: int, n: int) -> list[list[_Action | None]]:
    state = SimpleNamespace(pp_group_size=pp, _n_microbatches=max(n, 2 * pp))
    return [_computed(ScheduleDualPipeV, state, rank) for rank in range(pp)]


def _computed(kind: Any, state: SimpleNamespace, rank: int) -> list[_Action | None]:
    """What a schedule of torch computes from a few numbers of itself; made whole it would need processes."""
    actions: list[_Action | None] = kind._calculate_single_rank_operations(state, rank)
    return actions


@dataclass(frozen=True)
class Timing:
    """How long ranks take, in units of the costs.

    Attributes:
        length: from the first action of all to the last's end.
        idle: of each rank, in that time.
        waits: of each rank, between its own first action and its own last.
    """

    length: float
    idle: list[float]
    waits: list[float]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they do nothing."""
        return sum(self.idle) / (self.length * len(self.idle))


def simulate(order: Sequence[Sequence[_Action]], *, costs: Mapping[Kind, float], n_stages: int, n: int) -> Timing:
    """Run an order on paper: each rank does its actions one after another, each as soon as what it needs is there.

    Args:
        order: actions of each rank.
        costs: by kind; without one for a forward and backward at once they run one after the other.
        n_stages: in all.
        n: micro-batches.

    Raises:
        Malformed: it does not end, or is not n forwards and backwards of each stage, each before what needs it.
    """
    done: dict[tuple[int, Kind, int], float] = {}
    lists = [_flat(rank, apart=BOTH not in costs) for rank in order]
    places, clocks, busy = [0] * len(lists), [0.0] * len(lists), [0.0] * len(lists)
    firsts: list[float | None] = [None] * len(lists)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(lists):
            while places[rank] < len(actions):
                action = actions[places[rank]]
                parts = action.sub_actions or (action,)
                ready = [_ready(part, done, n_stages=n_stages) for part in parts]
                if None in ready:
                    break
                start = max(clocks[rank], *(time for time in ready if time is not None))
                firsts[rank] = start if firsts[rank] is None else firsts[rank]
                cost = costs[action.computation_type]
                clocks[rank], busy[rank], progress = start + cost, busy[rank] + cost, True
                places[rank] += 1
                for part in parts:
                    _note(part, done, time=clocks[rank])
    if any(place < len(actions) for place, actions in zip(places, lists, strict=True)):
        stuck = [actions[place] for place, actions in zip(places, lists, strict=True) if place < len(actions)]
        raise Malformed(f"nobody can go on: {stuck}")
    wanted = {(stage, kind, i) for stage in range(n_stages) for kind in (F, I, W) for i in range(n)}
    if set(done) != wanted:
        raise Malformed(f"left out or too much: {sorted(map(str, set(done) ^ wanted))}")
    length = max(clocks)
    waits = [end - (first or 0.0) - worked for end, first, worked in zip(clocks, firsts, busy, strict=True)]
    return Timing(length, [length - worked for worked in busy], waits)


def _flat(actions: Sequence[_Action], *, apart: bool) -> list[_Action]:
    """Actions with those at once taken apart, if they are to be."""
    return [part for each in actions for part in (each.sub_actions or (each,))] if apart else list(actions)


def _ready(action: _Action, done: Mapping[tuple[int, Kind, int], float], *, n_stages: int) -> float | None:
    """When all that an action needs is there; None: not yet.

    A forward needs that of the stage before; a backward its own forward and the backward of the stage after, of which
    the part for the input is enough; the part for weights needs that for the input.
    """
    stage, kind, i = action.stage_index, action.computation_type, action.microbatch_index
    assert i is not None, f"{action=}"
    needs = {
        F: [(stage - 1, F, i)] if stage else [],
        B: [(stage, F, i), *([(stage + 1, I, i)] if stage + 1 < n_stages else [])],
        W: [(stage, I, i)],
    }[B if kind is I else kind]
    return None if any(need not in done for need in needs) else max((done[need] for need in needs), default=0.0)


def _note(action: _Action, done: dict[tuple[int, Kind, int], float], *, time: float) -> None:
    """An action is done; a whole backward is both its parts.

    Raises:
        Malformed: it was done before.
    """
    stage, kind, i = action.stage_index, action.computation_type, action.microbatch_index
    assert i is not None, f"{action=}"
    for part in (I, W) if kind is B else (kind,):
        if (stage, part, i) in done:
            raise Malformed(f"twice: {action}")
        done[stage, part, i] = time


class Ordered(_PipelineScheduleRuntime):
    """torch's runtime for an order of ``orders``: it adds what ranks send and when FSDP gathers, and runs it."""

    def __init__(
        self,
        stages: list[Stage],
        order: list[list[_Action]],
        *,
        n: int,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        # Losses are divided by counts of the global batch: gradients are sums, never scaled.
        super().__init__(stages, n_microbatches=n, loss_fn=loss, scale_grads=False)
        self.pipeline_order = {rank: list(actions) for rank, actions in enumerate(order)}
        # It empties the lists that it is given.
        self._prepare_schedule_with_comms({rank: list(actions) for rank, actions in enumerate(order)})
        over = receipts(
            self.pipeline_order_with_comms, rank=self.rank, rank_of=self.stage_index_to_group_rank.__getitem__
        )
        self.sends, self._own = Sends(over), {stage.stage_index: stage for stage in stages}
        for kind in (Kind.SEND_F, Kind.SEND_B):
            self._comp_type_to_function_map[kind] = self._send
        for stage in stages:
            stage.arrived = self.sends.release

    def _send(self, action: _Action, _: Any) -> None:
        """Send the states or the gradient of a micro-batch, and hold it no longer than it takes (over pp)."""
        stage, i = self._own[action.stage_index], action.microbatch_index
        assert i is not None, f"{action=}"
        get = stage.get_fwd_send_ops if action.computation_type is Kind.SEND_F else stage.get_bwd_send_ops
        self.sends.post((action.stage_index, action.computation_type, i), get(i))

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> None:
        super()._step_microbatches(*args, **kwargs)
        self.sends.finish()

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Any:
        """The loss to differentiate; its graph, and with it the stage's input, would else be kept until the end."""
        loss = super()._maybe_get_loss(stage, mb_index)
        if loss is not None:
            self._internal_losses[mb_index] = loss.detach()
        return loss

    def _warmup_p2p(self, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
        """Open what neighbours talk over (a number each way between them, over pp); all shapes are known already.

        torch asks by those numbers whether they are, which a dry run without other ranks could not answer.
        """
        number: Tensor | None = None
        for stage in stages:
            number = stage._warmup_forward_vote(has_backward, received_acc=number)
        for stage in reversed(stages):
            number = stage._warmup_backward_result(received_result=number)
            stage._inference_mode = InferenceMode.STATIC
