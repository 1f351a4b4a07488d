"""Tokens that travel between ranks, against the same arithmetic in one process."""

from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from distributed import run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.comm import Lane
from parallel.expert import ExpertDispatcher, Trip, grouped_by_expert, ranks_of_group, share_experts
from zoo.config_ff import GroupScore, MoEConfig, RouterConfig, Score
from zoo.context import Context
from zoo.dispatch import Dispatcher, turns
from zoo.experts import Experts
from zoo.moe import MoE
from zoo.router import Router

D, E, S = 6, 8, 3
CONFIG = MoEConfig(
    n_experts=E, top_k=S, d_expert=5, d_shared=7, bias=True,
    router=RouterConfig(score=Score.softmax, normalize=False, scale=1.0),
)  # fmt: skip


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lane():
    group = torch.distributed.group.WORLD
    return Lane(group, group.rank(), group.size())


def bank():
    experts = Experts(CONFIG, d_model=D).to(torch.float64)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed)
    return experts


def choices(kind, n_tokens, seed):
    """Which experts each token wants: any three; the same three, of the first rank; all but those of the first rank."""
    generator = torch.Generator().manual_seed(seed)
    firsts = {"any": (0, E), "one rank": (0, S), "not the first rank": (E // 2, E)}
    low, high = firsts[kind]
    picks = [low + torch.randperm(high - low, generator=generator)[:S] for _ in range(n_tokens)]
    return torch.stack(picks) if picks else torch.zeros(0, S, dtype=torch.int64)


def through(dispatcher, experts, x, chosen, weights, early):
    """Results, gradients of tokens and weights, and of the experts, of some function of the results."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    sent = dispatcher.dispatch(x, chosen, n_experts=E, weights=weights, early=early)
    sent = dispatcher.arrived(sent)
    y = dispatcher.combine(experts(sent.rows, sent.counts), sent)
    (y.square() * x.detach().cos()).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return found, grads, sent.load, sent.counts


def case(tokens, kind, early, balanced=False):
    """One rank's part."""
    own = lane()
    whole = bank()
    experts = Experts(CONFIG, d_model=D).to(torch.float64)
    for name, parameter in whole.named_parameters():
        part = parameter.detach().chunk(own.size)[own.rank].clone()
        experts.register_parameter(name, torch.nn.Parameter(part))
    n = tokens[own.rank]
    dispatcher = ExpertDispatcher(own)
    dispatcher.balanced = balanced
    inputs = drawn(n, D, seed=50 + own.rank), choices(kind, n, own.rank), drawn(n, S, seed=80 + own.rank)
    return through(dispatcher, experts, *inputs, early)


def check(tokens, kind, early, balanced=False):
    results = run(case, world_size=len(tokens), tokens=tokens, kind=kind, early=early, balanced=balanced)
    ranks = range(len(tokens))
    x = torch.cat([drawn(tokens[r], D, seed=50 + r) for r in ranks])
    chosen = torch.cat([choices(kind, tokens[r], r) for r in ranks])
    if balanced:
        chosen = torch.cat([turns(choices(kind, tokens[r], r), E) for r in ranks])
    weights = torch.cat([drawn(tokens[r], S, seed=80 + r) for r in ranks])
    want, grads, load, _ = through(Dispatcher(), bank(), x, chosen, weights, early)
    for key, value in want.items():
        torch.testing.assert_close(torch.cat([found[key] for found, *_ in results]), value, rtol=1e-11, atol=1e-12)
    for name, value in grads.items():
        got = torch.cat([theirs[name] for _, theirs, *_ in results])
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-11)
    assert torch.equal(sum(theirs for *_, theirs, _ in results), load)
    assert torch.equal(torch.cat([counts for *_, counts in results]), load)
    return [counts.sum().item() for *_, counts in results]


@pytest.mark.parametrize("tokens", [[5, 9], [7, 4, 1, 6]])
@pytest.mark.parametrize("early", [False, True])
def test_tokens_come_back_from_experts_of_all_ranks_with_gradients(tokens, early):
    assert min(check(tokens, "any", early)) > 0


@pytest.mark.parametrize("kind", ["one rank", "not the first rank"])
def test_ranks_whose_experts_nobody_chose_take_part(kind):
    assert 0 in check([5, 9], kind, early=False)


def test_a_rank_without_tokens_takes_part():
    check([5, 0, 3, 7], "any", early=False)


@pytest.mark.parametrize("tokens", [[7, 7], [3, 3, 3, 3]])
def test_experts_that_take_turns_are_equally_busy_and_computed_right(tokens):
    busy = check(tokens, "one rank", early=False, balanced=True)
    assert max(busy) - min(busy) <= len(tokens) * (E // len(tokens))  # each differs by one row from each rank at most


def counted(n):
    """Bytes that one rank sends to others in a forward and in its backward, where experts are chosen in turns."""
    own, sent = lane(), []
    send = dist.all_to_all_single

    def told(filled, given, gets=None, gives=None, **kwargs):
        rows = gives or [len(given) // own.size] * own.size
        sent.append(sum(rows[: own.rank] + rows[own.rank + 1 :]) * given[:1].nbytes)
        return send(filled, given, gets, gives, **kwargs)

    dist.all_to_all_single = told
    dispatcher, x = ExpertDispatcher(own), drawn(n, D, seed=own.rank).requires_grad_()
    chosen = turns(torch.zeros(n, S, dtype=torch.int64), E)
    sent_rows = dispatcher.arrived(dispatcher.dispatch(x, chosen, n_experts=E, weights=drawn(n, S, seed=1)))
    y = dispatcher.combine(sent_rows.rows.tanh(), sent_rows)
    forward = list(sent)
    y.sum().backward()
    return forward, sent[len(forward) :]


def test_bytes_that_travel_are_those_of_the_docs():
    n, size = 16, 4
    rows = (size - 1) * n * S * D * 8 // size  # docs/parallel.md: x
    counts = (size - 1) * E * 8 // size
    assert run(counted, world_size=size, n=n) == [([counts, rows, rows], [rows, rows])] * size


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_rows_are_grouped_by_expert_and_stay_in_order_within(counts):
    experts = [expert for row in counts for expert, n in enumerate(row) for _ in range(n)]
    order = grouped_by_expert(torch.tensor(counts), n_rows=len(experts)).tolist()
    assert order == sorted(range(len(experts)), key=lambda place: (experts[place], place))


def order_of_events():
    """What happens when, in one layer on two ranks, forward and backward."""
    torch.manual_seed(0)
    with torch.device("meta"):
        moe = MoE(CONFIG, d_model=D).to(torch.float64)
    share_experts(moe, lane())
    moe.to_empty(device="cpu")
    for seed, parameter in enumerate(moe.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed)
    events = []

    class Told(Trip):
        def start(self, rows, *, back):
            events.append("leave")
            super().start(rows, back=back)

        def end(self):
            events.append("arrive")
            return super().end()

    import parallel.expert

    parallel.expert.Trip = Told
    moe.shared.register_forward_pre_hook(lambda *_: events.append("shared"))
    moe.experts.register_forward_pre_hook(lambda *_: events.append("experts"))
    moe.shared.up.weight.register_post_accumulate_grad_hook(lambda _: events.append("shared"))
    moe.experts.up.register_post_accumulate_grad_hook(lambda _: events.append("experts"))
    x = drawn(2, 4, D, seed=3).requires_grad_()
    context = Context(torch.arange(4).expand(2, 4), None, x.dtype, 4)
    y, _ = moe(x, context)
    forward = list(events)
    events.clear()
    y.square().sum().backward()
    return forward, events


def test_the_shared_expert_computes_while_tokens_travel_forward_and_backward():
    forward = ["leave", "shared", "arrive", "experts", "leave", "arrive"]
    backward = ["leave", "arrive", "experts", "leave", "shared", "arrive"]
    assert run(order_of_events, world_size=2) == [(forward, backward)] * 2


def traced(grouped, size):
    """A forward and backward without numbers, of one of ``size`` ranks that are not there."""
    if size > 1:
        torch.distributed.init_process_group("fake", rank=1, world_size=size, store=FakeStore())
    with torch.device("meta"):
        moe = MoE(replace(CONFIG, d_expert=16), d_model=8)
    moe.experts.grouped = grouped
    if size > 1:
        share_experts(moe, lane())
    moe.dispatcher.balanced = True
    with FakeTensorMode(allow_non_fake_inputs=True):
        moe.to_empty(device="cpu")
        x = torch.randn(2, 8, 8, dtype=torch.bfloat16, requires_grad=True)
        y, tally = moe(x, Context(torch.arange(8).expand(2, 8), None, x.dtype, 8, torch.tensor(4.0)))
        y.sum().backward()
    if size > 1:
        torch.distributed.destroy_process_group()
    return [tuple(each.shape) for each in (y, tally.load, x.grad, moe.experts.up.grad)]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_layer_is_traced_without_numbers(size, grouped):
    (shapes,) = run(traced, world_size=1, group=False, grouped=grouped, size=size)
    assert shapes == [(2, 8, 8), (E,), (2, 8, 8), (E // size, 16, 8)]


@pytest.mark.parametrize("n_groups, top_groups, ep", [(4, 2, 8), (4, 2, 16), (8, 4, 8), (4, 1, 2), (8, 3, 4)])
def test_no_token_travels_to_more_nodes_than_it_may_choose_groups(n_groups, top_groups, ep):
    routing = RouterConfig(
        score=Score.sigmoid, normalize=True, scale=1.0, n_groups=n_groups, top_groups=top_groups,
        group_score=GroupScore.best_two, balance_rate=0.1,
    )  # fmt: skip
    config = MoEConfig(n_experts=32, top_k=4, d_expert=4, d_shared=0, router=routing)
    router = Router(config, d_model=D).to(torch.float64)
    router.weight.data = drawn(32, D, seed=0)
    router.balance_bias.copy_(drawn(32, seed=1))
    chosen = router(drawn(200, D, seed=2)).chosen
    nodes = [set(ranks_of_group(group, n_groups=n_groups, ep=ep)) for group in range(n_groups)]
    homes = chosen // (32 // ep)  # ranks that have the experts
    assert set().union(*nodes) == set(range(ep))
    met = [{group for group in range(n_groups) if set(ranks.tolist()) & nodes[group]} for ranks in homes]
    if ep >= n_groups:  # nodes are apart
        assert prod(len(a & b) == 0 for a in nodes for b in nodes if a is not b)
        assert max(map(len, met)) <= top_groups
    assert all(any(rank in nodes[group] for group in (choice * n_groups // 32).tolist())
               for choice, ranks in zip(chosen, homes, strict=True) for rank in ranks.tolist())  # fmt: skip
