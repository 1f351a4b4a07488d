"""Losses of routers against plain sums in float64, one token, expert and device at a time."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_mixtral
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as of_qwen3
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from zoo.config_ff import BatchScope, DeviceLossConfig, GroupScore, MoEConfig, RouterConfig, Score, SwitchLossConfig
from zoo.context import Context
from zoo.moe import MoE
from zoo.router import Router, agreement

ROWS, LENGTH, EXPERTS, CHOSEN, GROUPS, OPEN = 3, 7, 12, 3, 4, 2
SWITCH = SwitchLossConfig(weight=0.3, scope=BatchScope.micro_batch)
GLOBAL = SwitchLossConfig(weight=0.3, scope=BatchScope.global_batch)
DEVICES = {"expert": 0.1, "device": 0.7, "communication": 0.4}
GROUPED = {"score": Score.softmax, "n_groups": GROUPS, "top_groups": OPEN, "group_score": GroupScore.best}


def config(**router):
    values = {"score": Score.sigmoid, "normalize": True, "scale": 2.5} | router
    return MoEConfig(n_experts=EXPERTS, top_k=CHOSEN, d_expert=6, d_shared=6, router=RouterConfig(**values))


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = module.to(torch.float64)
    for tensor in [*module.parameters(), *(b for name, b in module.named_buffers() if name.endswith("bias"))]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return module


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS * LENGTH, 5, generator=generator, dtype=torch.float64)


def counted(routing):
    return torch.bincount(routing.chosen.flatten(), minlength=EXPERTS)


def found(router, x):
    """The router's own, with gradients by its weight, of each loss."""
    routing = router(x)
    losses = router.losses(routing, counted(routing), rows=ROWS)
    on = [loss for loss in losses if loss.requires_grad]  # the z-loss, or all others, may be off
    grads = {id(loss): torch.autograd.grad(loss, router.weight, retain_graph=True)[0] for loss in on}
    return [loss.item() for loss in losses], [grads.get(id(loss)) for loss in losses]


def close(router, x, want, place=0):
    """Values and gradients equal a plain loss, summed over rows."""
    values, grads = found(router, x)
    assert values[place] == pytest.approx(want.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(want, router.weight)
    torch.testing.assert_close(grads[place], grad, rtol=1e-10, atol=1e-13)
    assert grad.abs().max() > 1e-4 * want.item()


def plain_scores(router, x):
    """(N, E) by the published formula."""
    logits = x @ router.weight.T
    if router.bias is not None:
        logits = logits + router.bias
    if router.config.softcap is not None:
        logits = router.config.softcap * torch.tanh(logits / router.config.softcap)
    return logits, (1 / (1 + (-logits).exp()) if router.config.score is Score.sigmoid else logits.softmax(-1))


def fraction(choices, expert, n_tokens):
    """f: how often an expert is among the choices, where 1 is an even share."""
    return EXPERTS / (CHOSEN * n_tokens) * sum(expert in chosen for chosen in choices)


@pytest.mark.parametrize("score", Score)
def test_the_sequence_wise_loss_is_that_of_deepseek_v3(score):
    router = filled(
        Router(config(score=score, n_groups=4, top_groups=2, balance_rate=0.1, balance_loss=0.1), d_model=5)
    )
    x, want = tokens(), 0.0
    _, scores = plain_scores(router, x)
    for row in scores.view(ROWS, LENGTH, EXPERTS):
        best = [torch.topk(token, CHOSEN).indices.tolist() for token in row]  # unbiased, ungrouped
        for i in range(EXPERTS):
            want = want + 0.1 * fraction(best, i, LENGTH) * sum(token[i] / token.sum() for token in row) / LENGTH
    close(router, x, want)


@pytest.mark.parametrize("score", Score)
def test_the_switch_loss_of_a_micro_batch_counts_all_its_rows_together(score):
    router = filled(Router(config(score=score, switch_loss=SWITCH), d_model=5))
    x, want = tokens(), 0.0
    _, scores = plain_scores(router, x)
    chosen = router(x).chosen.tolist()
    for i in range(EXPERTS):
        share = sum(token[i] / token.sum() for token in scores) / len(x)
        want = want + 0.3 * fraction(chosen, i, len(x)) * share
    close(router, x, ROWS * want)


def test_the_switch_loss_over_the_global_batch_takes_the_load_that_was_counted_ahead():
    router = filled(Router(config(score=Score.softmax, switch_loss=GLOBAL), d_model=5))
    load = torch.arange(EXPERTS, dtype=torch.float64)
    router.batch_load.copy_(load)
    x = tokens()
    _, scores = plain_scores(router, x)
    want = 0.3 * ROWS * sum(EXPERTS * load[i] / load.sum() * scores[:, i].mean() for i in range(EXPERTS))
    close(router, x, want)


@pytest.mark.parametrize("kind", DEVICES)
def test_the_losses_over_experts_devices_and_communication_are_those_of_deepseek_v2(kind):
    weights = dict.fromkeys(DEVICES, 0.0) | {kind: DEVICES[kind]}
    router = filled(Router(config(**GROUPED, device_loss=DeviceLossConfig(**weights)), d_model=5))
    x, want, size = tokens(), 0.0, EXPERTS // GROUPS
    _, scores = plain_scores(router, x)
    choices = router(x).chosen.view(ROWS, LENGTH, CHOSEN).tolist()
    assert any(len({e // size for e in token}) < OPEN for row in choices for token in row)  # else two losses are one
    for row, chosen in zip(scores.view(ROWS, LENGTH, EXPERTS), choices, strict=True):
        f = [fraction(chosen, i, LENGTH) for i in range(EXPERTS)]
        p = [sum(token[i] for token in row) / LENGTH for i in range(EXPERTS)]
        if kind == "expert":
            want = want + 0.1 * sum(a * b for a, b in zip(f, p, strict=True))
        for device in range(GROUPS):
            mine = range(device * size, (device + 1) * size)
            received = sum(any(e in mine for e in token) for token in chosen)
            if kind == "device":
                want = want + 0.7 * sum(f[i] for i in mine) / size * sum(p[i] for i in mine)
            elif kind == "communication":
                want = want + 0.4 * GROUPS / (OPEN * LENGTH) * received * sum(p[i] for i in mine)
    close(router, x, want)


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0, "bias": True, "score": Score.softmax}], ids=str)
def test_the_z_loss_is_that_of_st_moe_and_of_transformers(more):
    router = filled(Router(config(z_loss=0.01, **more), d_model=5))
    x = tokens()
    logits, _ = plain_scores(router, x)
    want = 0.01 * sum(token.exp().sum().log() ** 2 for token in logits) / LENGTH
    close(router, x, want, place=1)
    theirs = router_z_loss_func(logits.view(ROWS, LENGTH, EXPERTS))
    assert 0.01 * ROWS * theirs.item() == pytest.approx(want.item(), rel=1e-12)


def test_all_losses_that_are_on_add_up():
    kinds = {"balance_loss": 0.2, "switch_loss": SWITCH, "device_loss": DeviceLossConfig(**DEVICES), "z_loss": 0.01}
    x, sums = tokens(), [0.0, 0.0]
    for key, value in kinds.items():
        values, _ = found(filled(Router(config(**GROUPED, **{key: value}), d_model=5)), x)
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    values, _ = found(filled(Router(config(**GROUPED, **kinds), d_model=5)), x)
    assert values == pytest.approx(sums, rel=1e-12) and min(values) > 0


@pytest.mark.parametrize("theirs", [of_mixtral, of_qwen3])
def test_transformers_loss_of_one_layer_is_ours_times_the_number_of_chosen_experts(theirs):
    router = filled(Router(config(score=Score.softmax, switch_loss=replace(SWITCH, weight=1.0)), d_model=5))
    x = tokens()
    want = theirs((router(x).logits,), num_experts=EXPERTS, top_k=CHOSEN)
    (ours, _), _ = found(router, x)
    assert CHOSEN * ours / ROWS == pytest.approx(want.item(), rel=1e-6)  # theirs counts in fp32


def test_transformers_pools_layers_where_ours_add_up():
    routers = [filled(Router(config(score=Score.softmax, switch_loss=SWITCH), d_model=5), seed) for seed in (0, 1)]
    x, n = tokens(), 2
    routings = [router(x) for router in routers]
    load = sum(counted(routing).double() for routing in routings)
    shares = sum(routing.scores.mean(dim=0) for routing in routings) / n
    want = of_mixtral(tuple(routing.logits for routing in routings), num_experts=EXPERTS, top_k=CHOSEN)
    assert CHOSEN * agreement(load, shares).item() == pytest.approx(want.item(), rel=1e-6)  # theirs counts in fp32
    apart = sum(agreement(counted(r).double(), r.scores.mean(dim=0)).item() for r in routings)
    assert CHOSEN * apart / n != pytest.approx(want.item(), rel=1e-3)  # a layer's surplus makes up for another's


def test_megatron_s_loss_is_ours():
    """As switch_load_balancing_loss_func of megatron/core/transformer/moe/moe_utils.py has it."""
    router = filled(Router(config(score=Score.softmax, switch_loss=SWITCH), d_model=5))
    x = tokens()
    routing = router(x)
    probs, load, n = routing.scores.sum(dim=0), counted(routing), len(x)
    want = (probs * load).sum() * (EXPERTS * 0.3 / (CHOSEN * n * n))
    (ours, _), _ = found(router, x)
    assert ours / ROWS == pytest.approx(want.item(), rel=1e-12)


KINDS = {
    "sequence": {"balance_loss": 0.2},
    "switch": {"switch_loss": SWITCH},
    "global": {"switch_loss": GLOBAL},
    "devices": {"device_loss": DeviceLossConfig(**DEVICES)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_evenly_busy_experts_cost_a_loss_its_weight(kind):
    router = Router(config(**GROUPED, **KINDS[kind]), d_model=5).to(torch.float64)
    router.weight.data.zero_()
    routing = router(tokens()[: ROWS * 4])
    turns = torch.arange(ROWS * 4 * CHOSEN).remainder(EXPERTS).view(-1, CHOSEN)  # every row has each expert once
    routing = replace(routing, chosen=turns)
    router.batch_load.copy_(counted(routing))
    value, _ = router.losses(routing, counted(routing), rows=ROWS)
    weights = {"sequence": 0.2, "switch": 0.3, "global": 0.3}
    if kind == "devices":  # each token goes to one of the two that it might
        assert value.item() / ROWS == pytest.approx(0.1 + 0.7 + 0.4 / 2, rel=1e-12)
    else:
        assert value.item() / ROWS == pytest.approx(weights[kind], rel=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "z"])
def test_a_loss_joins_the_total_in_whatever_layer_it_is(kind):
    on = {"z_loss": 0.01} if kind == "z" else KINDS[kind]
    generator = torch.Generator().manual_seed(3)
    made = MoE(config(**GROUPED, **on), d_model=5).to(torch.float64)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    made.router.batch_load.copy_(torch.arange(EXPERTS))
    x, rows = tokens().view(ROWS, LENGTH, 5), torch.tensor(8.0, dtype=torch.float64)
    context = Context(torch.arange(LENGTH).expand(ROWS, LENGTH), None, x.dtype, LENGTH, rows)
    y, tally = made(x, context)
    silent, none = made(x, replace(context, rows=None))
    assert torch.equal(y, silent) and none.balance == none.z == 0
    (grad,) = torch.autograd.grad(y.square().sum(), made.router.weight)
    routing = made.router(x.flatten(0, 1))
    loss = sum(made.router.losses(routing, counted(routing), rows=ROWS)) / rows
    (want,) = torch.autograd.grad(silent.square().sum() + loss, made.router.weight)
    torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-13)
    assert (tally.balance + tally.z).item() == pytest.approx(loss.item(), rel=1e-12) and loss > 0
    assert tally.balance.requires_grad is tally.z.requires_grad is False


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("z_loss", -1.0, "router.z_loss=-1.0: must be 0 or more, and finite"),
        ("z_loss", math.inf, "router.z_loss=inf: must be 0 or more, and finite"),
        (
            "device_loss",
            DeviceLossConfig(0.1, 0.0, 0.2),
            "router.device_loss.communication=0.2: must be 0 where router",
        ),
    ],
)
def test_a_router_s_losses_are_checked(key, value, words):
    with pytest.raises(ValueError, match="^" + words):
        RouterConfig(score=Score.softmax, normalize=True, scale=1.0, **{key: value})


def test_weights_of_losses_are_checked():
    with pytest.raises(ValueError, match=r"^switch_loss.weight=nan: must be 0 or more, and finite$"):
        SwitchLossConfig(weight=math.nan, scope=BatchScope.micro_batch)
    with pytest.raises(ValueError, match=r"^device_loss.communication=-0.1: must be 0 or more, and finite$"):
        DeviceLossConfig(expert=0.0, device=0.0, communication=-0.1)
