"""Expert parallelism: ranks of the axis ep have some experts each, and tokens travel to them and back.

A rank sorts its tokens' choices by expert, which is by rank too, and sends each rank the rows of its experts, however
many these are: none is dropped. The other way, results go where their tokens came from. Both ways are one all-to-all of
uneven parts, whose gradient is the all-to-all back; so the gradients of an expert are complete where it is. Source:
GShard, arXiv 2006.16668, section 3.2; without capacities as in DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.comm import Lane, gather, scatter
from parallel.tensor import SharedBlock, become
from zoo.block import Block
from zoo.context import Context
from zoo.dispatch import Dispatcher, Sent, departing
from zoo.experts import Experts
from zoo.mlp import MLP
from zoo.moe import MoE
from zoo.router import Router, Tally


class Trip:
    """An exchange of rows, and its way back in the backward.

    Attributes:
        lane: the ranks of ep.
        gives: how many rows this rank sends to each of them.
        gets: how many it gets from each.
    """

    def __init__(self, lane: Lane, *, gives: list[int], gets: list[int]) -> None:
        self.lane, self.gives, self.gets = lane, gives, gets
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, back: bool) -> None:
        """Begin to send (Σ gives, …), or ``back`` (Σ gets, …) (one all-to-all over ep)."""
        gives, gets = (self.gets, self.gives) if back else (self.gives, self.gets)
        rows, filled = rows.contiguous(), rows.new_empty(sum(gets), *rows.shape[1:])
        assert self._under_way is None, "a trip ends before the next one starts"
        work = dist.all_to_all_single(filled, rows, gets, gives, group=self.lane.group, async_op=True)
        self._under_way = (work, rows, filled)  # what is sent stays until it was

    def end(self) -> Tensor:
        """Wait for what was started, and give it."""
        assert self._under_way is not None, "a trip starts before it ends"
        work, _, filled = self._under_way
        work.wait()
        self._under_way = None
        return filled


class _Leave(torch.autograd.Function):
    """Start a trip, and give a ticket; what comes between this and ``_Arrive`` runs meanwhile, in the backward too.

    Rows do not go from one to the other as a result, for a gradient has the shape of what it is of, not of what left.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.start(rows, back=False)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.end(), None


class _Arrive(torch.autograd.Function):
    """End a trip, for its ticket; in the backward start its way back."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.trip.start(grads[0], back=True)
        return grads[0].new_empty(0), None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient's are put back by their places, which needs no sums."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0].index_select(0, back), None, None


@dataclass
class Travelled(Sent):
    """Rows of all ranks for the experts that are here; a ticket in their place until they have arrived.

    Attributes:
        trip: on which they came.
        order: (M,) int64, for each row grouped by expert its place as it arrived.
        back: (M,) int64, the other way round.
    """

    trip: Trip
    order: Tensor
    back: Tensor


class ExpertDispatcher(Dispatcher):
    """Sends rows to the ranks that have their experts: rank r of n has experts r·E/n to (r+1)·E/n.

    Each layer waits once for the device, to learn how many rows come; ``balanced`` does without.
    """

    travels = True

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self.lane = lane

    def dispatch(self, x: Tensor, chosen: Tensor, *, n_experts: int, weights: Tensor, early: bool = False) -> Travelled:
        """As ``Dispatcher``; rows are on their way (all-to-alls over ep: of counts, of rows; backward one of rows)."""
        slots, load = self._sorted(chosen, n_experts)
        sent = departing(x, slots, load=load, weights=weights, early=early)
        counts, trip = self._even(chosen.numel(), load) if self.balanced else self._counted(load)  # (ep, E/ep)
        order = grouped_by_expert(counts, n_rows=sum(trip.gets))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ticket = _Leave.apply(sent.rows, trip)
        return Travelled(ticket, counts.sum(0), slots, sent.weights, load, trip, order, back)

    def arrived(self, sent: Sent) -> Sent:
        """Wait for the rows, and group them by expert (backward: start their way back)."""
        assert isinstance(sent, Travelled), f"{type(sent)=}"
        rows = _Reorder.apply(_Arrive.apply(sent.rows, sent.trip), sent.order, sent.back)
        return Travelled(**(vars(sent) | {"rows": rows}))

    def combine(self, y: Tensor, sent: Sent) -> Tensor:
        """As ``Dispatcher``, of results on all ranks (one all-to-all of rows over ep; as many in the backward)."""
        assert isinstance(sent, Travelled), f"{type(sent)=}"
        trip = Trip(sent.trip.lane, gives=sent.trip.gets, gets=sent.trip.gives)
        ticket = _Leave.apply(_Reorder.apply(y, sent.back, sent.order), trip)
        return super().combine(_Arrive.apply(ticket, trip), sent)

    def _counted(self, load: Tensor) -> tuple[Tensor, Trip]:
        """Rows that each rank has for each expert here (ep, E/ep), and the trip (one all-to-all of counts over ep)."""
        giving = load.view(self.lane.size, -1)
        getting = torch.empty_like(giving)
        dist.all_to_all_single(getting, giving, group=self.lane.group)
        gives, gets = torch.stack([giving.sum(1), getting.sum(1)]).tolist()
        return getting, Trip(self.lane, gives=gives, gets=gets)

    def _even(self, n_choices: int, load: Tensor) -> tuple[Tensor, Trip]:
        """As ``_counted`` where experts take turns on every rank, and each has as many tokens: no communication."""
        n_experts, lane = load.shape[0], self.lane
        rows = [n_choices // n_experts + (expert < n_choices % n_experts) for expert in range(n_experts)]
        shares = [rows[first : first + n_experts // lane.size] for first in range(0, n_experts, n_experts // lane.size)]
        gives = [sum(share) for share in shares]
        here = torch.tensor(shares[lane.rank], device=load.device)
        return here.expand(lane.size, -1), Trip(lane, gives=gives, gets=[gives[lane.rank]] * lane.size)


def grouped_by_expert(counts: Tensor, *, n_rows: int) -> Tensor:
    """Places (M,) of rows, which arrive rank after rank, in the order of experts.

    Example: of two ranks and two experts, the rows are for experts 0 0 1 from the first rank and 0 1 1 from the second:
    counts 2 1, 1 2 give 0 1 3 2 4 5.

    Args:
        counts: (ep, experts here), rows from each rank for each expert.
        n_rows: their sum.
    """
    experts = torch.arange(counts.shape[1], device=counts.device).expand_as(counts).flatten()
    return experts.repeat_interleave(counts.flatten(), output_size=n_rows).argsort(stable=True)


class RowRouter(Router):
    """A router of ranks that have parts of the same rows.

    Attributes:
        lanes: axes along which they have.
    """

    lanes: tuple[Lane, ...]

    def _over_rows(self, counts: Tensor) -> Tensor:
        """Sum in place over the ranks that share rows (an all-reduce over each of cp and, with whole experts, tp)."""
        for lane in self.lanes:
            dist.all_reduce(counts, group=lane.group)
        return counts


class GatheredMLP(MLP):
    """A feed-forward that ranks of tp share, among others that they do not: it gathers tokens for itself."""

    lane: Lane

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T/tp, D) to (B, T/tp, D) (one all-gather and one reduce-scatter over tp; as many in the backward)."""
        return scatter(super().forward(gather(x, self.lane)), self.lane)


class OwnTokensBlock(SharedBlock):
    """A layer whose experts are whole: routers see a rank's own tokens, what tp shares gathers by itself."""

    def _feed_forward(self, h: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        return Block._feed_forward(self, h, context)


def share_experts(
    model: nn.Module,
    ep: Lane,
    *,
    tp: Lane | None = None,
    expert_tp: bool = True,
    dispatcher: Callable[[], Dispatcher] | None = None,
) -> None:
    """Leave this rank its experts, of a model on the meta device, and let tokens travel to the others; in place.

    After ``parallel.tensor.share_layers``; no communication.

    Args:
        model: whose layers tp has shared, if there is tp.
        ep: ranks among which experts are shared out.
        tp: ranks that share layers.
        expert_tp: whether they share each expert too. If not, ranks of tp are among those of ``ep``, and each sends its
            own tokens of a row.
        dispatcher: makes what sends the tokens of one layer; None: by all-to-alls.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            _keep_own(module.experts, ep)
            module.dispatcher = ExpertDispatcher(ep) if dispatcher is None else dispatcher()
    if tp is None or expert_tp:
        return
    for block in model.modules():
        if not isinstance(block, Block) or block.moe is None:
            continue
        block.moe.balance_share = 1.0
        block.moe.experts.adds_bias = True
        for mlp in (block.mlp, block.moe.shared):
            if mlp is not None:
                become(mlp, GatheredMLP, lane=tp)
        become(block, OwnTokensBlock)


def _keep_own(experts: Experts, ep: Lane) -> None:
    """Cut dimension 0 of all parameters, whatever tp has cut."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        assert parameter.shape[0] % ep.size == 0, f"{parameter.shape=} {ep.size=}"
        shape = (parameter.shape[0] // ep.size, *parameter.shape[1:])
        experts.register_parameter(name, nn.Parameter(parameter.new_empty(shape)))


def join_routers(model: nn.Module, lanes: tuple[Lane, ...]) -> None:
    """Let routers know of ranks that have other tokens of the same rows, for balance losses; no communication.

    Args:
        model: any.
        lanes: cp, where there is cp, and tp where experts are whole.
    """
    for module in model.modules():
        if isinstance(module, Router):
            become(module, RowRouter, lanes=lanes, row_parts=prod(lane.size for lane in lanes))


def ranks_of_group(group: int, *, n_groups: int, ep: int) -> range:
    """Ranks of ep that have the experts of a routing group: neighbours, so that a group can be a node.

    A token that may choose from ``top_groups`` groups then travels to that many nodes at most (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2).

    Example: 4 groups over 8 ranks are on ranks 0 1, 2 3, 4 5 and 6 7; 4 groups over 2 ranks on 0, 0, 1 and 1.
    """
    return range(group * ep // n_groups, -(-(group + 1) * ep // n_groups))
