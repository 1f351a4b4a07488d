from types import SimpleNamespace

import pytest
import torch
from models import compose, randomized
from sharing import LENGTH, ROWS, Case

from parallel.config_fit import Sizes
from parallel.mesh import Mesh
from trainer import balance
from zoo.config_ff import MoEConfig, RouterConfig, Score
from zoo.router import Router

ALONE = Mesh(Sizes(1, 1), torch.device("cpu"), None, 0)


def test_busy_experts_lose_and_idle_ones_gain_as_much_in_all():
    model = randomized(compose("deepseek_v3_tiny", d_model=32, n_layers=2), seed=0)
    router = next(iter(model.routers().values()))
    router.balance_bias.zero_()
    router.load.zero_()
    router.load[:4] = 8.0  # 32 tokens over 16 experts: four have four times the mean, twelve have none
    rate = router.config.balance_rate
    loads = balance.update(model, ALONE)
    assert loads[0].sum() == 32
    mean = rate * (12 - 4) / 16
    assert router.balance_bias[:4].tolist() == pytest.approx([-rate - mean] * 4)
    assert router.balance_bias[4:].tolist() == pytest.approx([rate - mean] * 12)
    assert router.balance_bias.sum().item() == pytest.approx(0, abs=1e-9)
    assert router.load.sum() == 0


def test_loads_count_training_and_not_evaluation():
    model = randomized(compose("deepseek_v3_tiny", d_model=32, n_layers=3, n_mtp=0), seed=0)
    tokens = torch.randint(0, 4096, (2, 9))
    router = next(iter(model.routers().values()))
    router.load.zero_()
    model.eval()(tokens)
    assert router.load.sum() == 0
    model.train()(tokens)
    model(tokens)
    assert router.load.sum() == 2 * 2 * 9 * router.top_k


class Layers(torch.nn.Module):
    """Nothing but routers, as ``balance`` sees a model."""

    def __init__(self, *rates):
        super().__init__()
        self.found = torch.nn.ModuleList(Router(moe(rate), d_model=3) for rate in rates)
        self.config = SimpleNamespace(layers=[SimpleNamespace(moe=moe(rate)) for rate in rates], n_mtp=0)

    def routers(self):
        return {f"blocks.{i}.moe.router": router for i, router in enumerate(self.found)}


def moe(rate):
    router = RouterConfig(score=Score.softmax, normalize=True, scale=1.0, balance_rate=rate)
    return MoEConfig(n_experts=4, top_k=2, d_expert=6, d_shared=0, router=router)


@pytest.mark.parametrize("rates", [(None, None), (None, 0.5), (0.5, 0.0)])
def test_routers_without_a_bias_are_counted_and_not_moved(rates):
    model = Layers(*rates)
    for router in model.found:
        router.load.copy_(torch.tensor([5.0, 1.0, 1.0, 1.0]))
        router.balance_value.fill_(2.0)
    loads = balance.update(model, ALONE)
    assert loads.tolist() == [[5.0, 1.0, 1.0, 1.0]] * 2
    for router, rate in zip(model.found, rates, strict=True):
        assert router.load.sum() == 0 and router.balance_value == 0
        assert (router.balance_bias is None) == (rate is None)
        if rate is not None:
            assert router.balance_bias.tolist() == pytest.approx([-1.5 * rate, 0.5 * rate, 0.5 * rate, 0.5 * rate])


def test_a_model_without_experts_has_nothing_to_balance():
    assert balance.update(randomized(compose("llama3_tiny"), seed=0), ALONE) is None


def test_biases_sum_to_nothing_whatever_the_loads():
    model = Layers(0.5)
    (router,) = model.found
    for _ in range(300):
        router.load.copy_(torch.tensor([13.0, 1.0, 1.0, 1.0]))  # three gain what one loses: by u each, they would drift
        balance.update(model, ALONE)
    assert router.balance_bias.sum().item() == pytest.approx(0, abs=1e-4)
    assert router.balance_bias[0] < 0 < router.balance_bias[1]


def test_a_bias_moves_once_an_update_by_the_load_of_all_its_micro_batches():
    case = Case("deepseek_v3", micro=2)
    routers = [*case.model.routers().values()]
    before = [router.balance_bias.clone() for router in routers]
    numbers = case.update(0)
    loads = torch.tensor(numbers[-8 * len(routers) :], dtype=torch.float64).view(-1, 8)
    assert loads.sum(dim=1).tolist() == [ROWS * LENGTH * 3] * len(routers)
    for router, old, load in zip(routers, before, loads, strict=True):
        step = 0.01 * torch.sign(load.mean() - load)
        torch.testing.assert_close(router.balance_bias - old, step - step.mean(), rtol=1e-9, atol=1e-12)
