import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zoo.config_ff import GroupScore, MoEConfig, RouterConfig, Score
from zoo.router import Router


def config(n_experts=12, top_k=3, **router):
    values = {"score": Score.sigmoid, "normalize": True, "scale": 2.5} | router
    return MoEConfig(n_experts=n_experts, top_k=top_k, d_expert=6, d_shared=6, router=RouterConfig(**values))


def made(c, seed=0):
    generator = torch.Generator().manual_seed(seed)
    router = Router(c, d_model=5).to(torch.float64)
    for tensor in [*router.parameters(), *([] if router.balance_bias is None else [router.balance_bias])]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) - 0.5)
    return router


def tokens(n, seed=0):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_logits(router, x):
    """Of one token, as a list."""
    c = router.config
    logits = [sum(w * v for w, v in zip(row, x.tolist(), strict=True)) for row in router.weight.tolist()]
    if c.bias:
        logits = [each + b for each, b in zip(logits, router.bias.tolist(), strict=True)]
    return logits if c.softcap is None else [c.softcap * math.tanh(each / c.softcap) for each in logits]


def softmax(numbers):
    powers = [math.exp(each) for each in numbers]
    return [each / sum(powers) for each in powers]


def plain(router, x):
    """What one token's experts weigh, by expert, and how near the closest rejected expert or group came."""
    c, logits = router.config, plain_logits(router, x)
    scores = [1 / (1 + math.exp(-each)) for each in logits] if c.score is Score.sigmoid else softmax(logits)
    bias = [0.0] * len(scores) if router.balance_bias is None else router.balance_bias.tolist()
    biased = [each + b for each, b in zip(scores, bias, strict=True)]

    size = len(biased) // c.n_groups
    groups = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(c.n_groups)]
    worth = [group[0] if c.group_score is GroupScore.best else sum(group[:2]) for group in groups]
    open_groups = sorted(range(c.n_groups), key=lambda g: -worth[g])
    order = [e for e in range(len(biased)) if e // size in open_groups[: c.top_groups]]
    order.sort(key=lambda e: -biased[e])
    chosen = order[: router.top_k]

    rejected = [worth[g] for g in open_groups[c.top_groups :]]
    margins = [worth[open_groups[c.top_groups - 1]] - max(rejected)] if rejected else []
    margins += [biased[chosen[-1]] - biased[e] for e in order[router.top_k :]]
    weights = softmax([logits[e] for e in chosen]) if c.score is Score.softmax_chosen else [scores[e] for e in chosen]
    total = sum(weights) if c.normalize else 1.0
    return {e: w / total * c.scale for e, w in zip(chosen, weights, strict=True)}, min(margins, default=1.0)


@st.composite
def routers(draw):
    n_groups = draw(st.integers(1, 4))
    size = draw(st.integers(2, 4))
    top_groups = draw(st.integers(1, n_groups))
    values = {
        "score": draw(st.sampled_from(Score)),
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5, 16.0])),
        "n_groups": n_groups,
        "top_groups": top_groups,
        "group_score": draw(st.sampled_from(GroupScore)),
        "bias": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "balance_rate": draw(st.sampled_from([None, 0.001])),
    }
    top_k = draw(st.integers(1, size * top_groups))
    return made(config(n_experts=size * n_groups, top_k=top_k, **values), seed=draw(st.integers(0, 2**31)))


@settings(max_examples=150, deadline=None)
@given(routers(), st.integers(0, 2**31))
def test_choices_and_weights_equal_a_plain_computation(router, seed):
    x = tokens(4, seed)
    routing = router(x)
    for token, chosen, weights in zip(x, routing.chosen.tolist(), routing.weights.tolist(), strict=True):
        want, margin = plain(router, token)
        assume(margin > 1e-9)
        assert len(set(chosen)) == router.top_k
        assert dict(zip(chosen, weights, strict=True)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_reach_weight_bias_and_input_alike(score, normalize):
    """By finite differences, at a point where no choice is close."""
    router = made(config(score=score, normalize=normalize, bias=True, softcap=3.0))
    x = tokens(3)
    assert min(plain(router, token)[1] for token in x) > 1e-4
    chosen = router(x).chosen

    def weights(x, weight, bias):
        routing = torch.func.functional_call(router, {"weight": weight, "bias": bias}, (x,))
        return torch.zeros(3, 12, dtype=torch.float64).scatter(1, routing.chosen, routing.weights), routing.scores

    tensors = [each.detach().clone().requires_grad_() for each in (x, router.weight, router.bias)]
    assert torch.equal(router(x).chosen, chosen)
    assert torch.autograd.gradcheck(weights, tensors, eps=1e-6)


@pytest.mark.parametrize("top_groups", [1, 2, 4])
def test_closed_groups_stay_closed_under_negative_scores(top_groups):
    c = config(n_groups=4, top_groups=top_groups, balance_rate=0.001)
    router = made(c)
    router.balance_bias.sub_(5.0)  # all biased scores below the zeros that a mask might leave
    x = tokens(20)
    for token, chosen in zip(x, router(x).chosen.tolist(), strict=True):
        assert set(chosen) == set(plain(router, token)[0])


def test_the_choice_by_logits_does_not_tie_where_a_sigmoid_saturates():
    router = Router(config(n_experts=4, top_k=1, normalize=False, scale=1.0), d_model=4)
    router.weight.data = 30 + 10 * torch.eye(4)  # in fp32 the sigmoid of 30 is that of 40: one
    routing = router(torch.eye(4))
    assert routing.chosen.flatten().tolist() == [0, 1, 2, 3]
    assert routing.weights.flatten().tolist() == [1.0] * 4


def test_logits_of_bf16_are_computed_in_fp32():
    router = Router(config(n_experts=4, top_k=2, bias=True, score=Score.softmax, normalize=False), d_model=64)
    torch.manual_seed(0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(9, 64).bfloat16()
    routing = router(x)
    rounded = {name: value.bfloat16().double() for name, value in router.named_parameters()}
    want = torch.nn.functional.linear(x.double(), rounded["weight"], rounded["bias"]).softmax(dim=-1)
    assert routing.weights.dtype is torch.float32
    torch.testing.assert_close(routing.scores.double(), want, rtol=1e-4, atol=1e-7)


def test_only_a_balanced_router_has_the_buffer_and_only_a_biased_one_the_bias():
    assert set(Router(config(), d_model=5).state_dict()) == {"weight"}
    assert set(Router(config(balance_rate=0.0), d_model=5).state_dict()) == {"weight", "balance_bias"}
    assert set(Router(config(bias=True), d_model=5).state_dict()) == {"weight", "bias"}
