from dataclasses import replace

import pytest
import torch

from zoo.activation import activate
from zoo.config_ff import Activation, MoEConfig, RouterConfig, Score
from zoo.context import Context
from zoo.moe import MoE
from zoo.router import Routing

SHAPES = {
    "mixtral": {"router": RouterConfig(score=Score.softmax, normalize=True, scale=1.0), "d_shared": 0},
    "deepseek_v3": {
        "router": RouterConfig(
            score=Score.sigmoid, normalize=True, scale=2.5, n_groups=4, top_groups=2, balance_rate=0.001
        )
    },
    "gpt_oss": {
        "router": RouterConfig(score=Score.softmax_chosen, normalize=False, scale=1.0, bias=True),
        "d_shared": 0,
        "bias": True,
        "activation": Activation.swiglu_clamped,
    },
    "llama4": {
        "router": RouterConfig(score=Score.sigmoid, normalize=False, scale=1.0),
        "top_k": 1,
        "scale_input": True,
    },
    "inputs_of_several": {
        "router": RouterConfig(score=Score.sigmoid, normalize=False, scale=1.0),
        "bias": True,
        "scale_input": True,
    },
    "qwen3_next": {"router": RouterConfig(score=Score.softmax, normalize=True, scale=1.0), "shared_gate": True},
    "grok2": {
        "router": RouterConfig(score=Score.softmax, normalize=False, scale=1.0, softcap=3.0),
        "activation": Activation.geglu,
    },
}


def made(**values):
    config = MoEConfig(**({"n_experts": 12, "top_k": 3, "d_expert": 6, "d_shared": 7} | values))
    torch.manual_seed(0)
    moe = MoE(config, d_model=5).to(torch.float64)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    return moe


def context(x, rows=None):
    return Context(torch.arange(x.shape[1]).expand(x.shape[:2]), None, x.dtype, 64, rows)


def feed_forward(moe, e, x):
    """What expert ``e`` makes of one token."""
    bank = moe.experts
    zero = torch.zeros((), dtype=x.dtype)
    biases = [zero if b is None else b[e] for b in (bank.gate_bias, bank.up_bias, bank.down_bias)]
    h = activate(bank.gate[e] @ x + biases[0], bank.up[e] @ x + biases[1], bank.activation)
    return bank.down[e] @ h + biases[2]


def plain(moe, x, routing: Routing):
    """One token and one expert after another."""
    results = []
    for n, token in enumerate(x.flatten(0, 1)):
        y = torch.zeros_like(token)
        for e, weight in zip(routing.chosen[n].tolist(), routing.weights[n], strict=True):
            y = y + (feed_forward(moe, e, weight * token) if moe.scale_input else weight * feed_forward(moe, e, token))
        if moe.shared is not None:
            gate = 1.0 if moe.shared_gate is None else torch.sigmoid(moe.shared_gate.weight[0] @ token)
            y = y + gate * moe.shared(token)
        results.append(y)
    return torch.stack(results).view_as(x)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_one_token_and_one_expert_after_another_with_gradients(shape):
    moe = made(**SHAPES[shape])
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    got, tally = moe(x, context(x))
    routing = moe.router(x.flatten(0, 1))
    want = plain(moe, x, routing)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    loads = torch.bincount(routing.chosen.flatten(), minlength=12)
    assert torch.equal(tally.load, loads)

    pull, named = torch.randn_like(got), {"x": x, **dict(moe.named_parameters())}
    grads = torch.autograd.grad((got * pull).sum(), list(named.values()))
    expected = torch.autograd.grad((want * pull).sum(), list(named.values()), materialize_grads=True)
    for name, each, other in zip(named, grads, expected, strict=True):
        assert other.abs().sum() > 0, name
        torch.testing.assert_close(each, other, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_float64(shape):
    moe = made(**SHAPES[shape]).float()
    for parameter in moe.parameters():
        parameter.data = (0.5 * parameter.data).bfloat16().float()
    x = torch.randn(2, 7, 5).bfloat16()
    routing = moe.router(x.flatten(0, 1))
    got, _ = moe(x, context(x))
    assert got.dtype is torch.bfloat16
    want = plain(moe.double(), x.double(), replace(routing, weights=routing.weights.double()))
    assert (got.double() - want).norm() < 2e-2 * want.norm()


def test_lives_on_the_meta_device():
    with torch.device("meta"):
        moe = MoE(MoEConfig(n_experts=4, top_k=2, d_expert=6, d_shared=7, **SHAPES["qwen3_next"]), d_model=5)
    assert all(tensor.is_meta for tensor in [*moe.parameters(), *moe.buffers()])
