"""Three updates of small models in float64 whose layers several ranks share, against one process."""

import pytest
import torch
from distributed import run
from sharing import ALONE, FAMILIES, LENGTH, Case, rows, same

from parallel.config import ParallelConfig
from zoo.generate import generate


def train(name, plan):
    """Losses, norms, what was updated, and what the model then says: logits of rows of any length, and a sample."""
    torch.set_num_threads(1)
    case = Case(name, plan)
    numbers = [case.update(step) for step in range(3)]
    model, tensors = case.model, {}
    for length in (1, 11, LENGTH):
        with torch.no_grad():
            tensors[f"logits/{length}"] = model(rows(7, 0).tokens[:, :length]).clone()
    tensors["sample"] = torch.tensor(generate(model, prompt=[3, 1, 4], n_tokens=8, device=case.mesh.device))
    return numbers, tensors | case.tensors()


def worst(name, plan, world_size):
    """Compare a plan with one process; the worst relative differences of numbers and of tensors."""
    numbers, tensors = train(name, ALONE)
    want, far = torch.tensor(numbers, dtype=torch.float64), [0.0, 0.0]
    results = run(train, world_size=world_size, timeout=300, name=name, plan=plan)
    for their_numbers, their_tensors in results:
        assert their_numbers == results[0][0], "ranks differ"
        assert [key for key, x in their_tensors.items() if not torch.equal(x, results[0][1][key])] == [], "ranks differ"
        got = torch.tensor(their_numbers, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
        far[0] = max(far[0], ((got - want).abs() / want.abs().clamp(min=1e-30)).max().item())
        far[1] = max(far[1], same(their_tensors, tensors))
    print(f"{name} {plan.dp_replicate}x{plan.dp_shard}x{plan.tp}: {far[0]:.1e} {far[1]:.1e}")
    return far


PLANS = {"tp2": (1, 1, 2), "tp4": (1, 1, 4), "fsdp2_tp2": (1, 2, 2), "hsdp2_tp2": (2, 1, 2)}
FAST = [("llama3", "tp4"), ("deepseek_v3", "tp2"), ("gpt_oss", "fsdp2_tp2")]
EVERY = [(family, plan) for family in FAMILIES for plan in PLANS]


def marked(cases):
    slow = [case for case in EVERY if case not in FAST]
    return [*cases, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize("name, plan", marked(FAST))
def test_shared_layers_update_as_one_process_does(name, plan):
    replicate, shard, tp = PLANS[plan]
    worst(name, ParallelConfig(dp_replicate=replicate, dp_shard=shard, tp=tp), world_size=replicate * shard * tp)
