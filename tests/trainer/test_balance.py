import pytest
import torch
from models import compose, randomized

from parallel.config import Sizes
from parallel.mesh import Mesh
from trainer import balance

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


def test_a_model_without_experts_has_nothing_to_balance():
    assert balance.update(randomized(compose("llama3_tiny"), seed=0), ALONE) is None
