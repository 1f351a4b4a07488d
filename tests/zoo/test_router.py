import pytest
import torch

from zoo.config import MoEConfig, RouterConfig
from zoo.context import Context
from zoo.mask import Mask
from zoo.moe import MoE
from zoo.router import Router


def config(n_experts=12, top_k=3, n_groups=4, top_groups=2, balance_loss=0.1):
    router = RouterConfig(
        scale=2.5, n_groups=n_groups, top_groups=top_groups, balance_rate=0.001, balance_loss=balance_loss
    )
    return MoEConfig(n_experts=n_experts, top_k=top_k, d_expert=6, d_shared=6, router=router)


def made(module):
    torch.manual_seed(0)
    module = module.to(torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def choose_plainly(biased, c):
    size = c.n_experts // c.router.n_groups
    groups = [sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(c.router.n_groups)]
    open_groups = sorted(range(c.router.n_groups), key=lambda g: -groups[g])[: c.router.top_groups]
    allowed = [e for e in range(c.n_experts) if e // size in open_groups]
    return set(sorted(allowed, key=lambda e: -biased[e])[: c.top_k])


@pytest.mark.parametrize("top_groups", [1, 2, 4])
def test_choice_follows_biased_scores_and_weights_the_unbiased(top_groups):
    c = config(top_groups=top_groups)
    router = made(Router(c, d_model=5))
    router.balance_bias.copy_(torch.randn(c.n_experts) - 1.0)  # negative ones too: closed groups must not win by zeros
    x = torch.randn(20, 5, dtype=torch.float64)
    routing = router(x)
    scores = torch.sigmoid(x @ router.weight.t())
    for n in range(20):
        assert set(routing.chosen[n].tolist()) == choose_plainly((scores[n] + router.balance_bias).tolist(), c)
    taken = scores.gather(1, routing.chosen)
    torch.testing.assert_close(routing.weights, 2.5 * taken / taken.sum(1, keepdim=True))


def test_balance_loss_equals_the_published_formula():
    c = config()
    router = made(Router(c, d_model=5))
    scores = torch.rand(2 * 7, c.n_experts, dtype=torch.float64)
    want = 0.0
    for row in scores.view(2, 7, c.n_experts):
        for expert in range(c.n_experts):
            chosen = sum(expert in torch.topk(token, c.top_k).indices.tolist() for token in row)
            fraction = c.n_experts / (c.top_k * 7) * chosen
            share = sum(token[expert] / token.sum() for token in row) / 7
            want += 0.1 * fraction * share
    assert router.balance_loss(scores, rows=2).item() == pytest.approx(want.item(), rel=1e-12)


def test_attached_loss_adds_its_gradient_and_leaves_the_output_alone():
    c = config()
    moe = made(MoE(c, d_model=5))
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(7).expand(2, 7)
    rows = torch.tensor(4.0, dtype=torch.float64)
    with_loss, tally = moe(x, Context(positions, Mask(None), x.dtype, 64, rows))
    without, _ = moe(x, Context(positions, Mask(None), x.dtype, 64))
    assert torch.equal(with_loss, without)

    weight = moe.router.weight
    attached = torch.autograd.grad(with_loss.square().sum(), weight)[0]
    loss = moe.router.balance_loss(moe.router(x.flatten(0, 1)).scores, rows=2) / rows
    plain = torch.autograd.grad(without.square().sum() + loss, weight)[0]
    torch.testing.assert_close(attached, plain, rtol=1e-12, atol=1e-12)
    assert tally.balance.item() == pytest.approx(loss.item(), rel=1e-12)
    assert tally.load.sum() == 2 * 7 * c.top_k
