"""Balance losses under every plan, in float64: three updates against one process, and their counts."""

import functools

import pytest
import torch
from distributed import run
from sharing import ALONE, DEVICES, LENGTH, ROWS, SWITCH, Case, merged, same, shrunk

from parallel.config import ParallelConfig, PipelineConfig, Remat, ScheduleName

MICRO = 2  # rows of a micro-batch under every plan: four of them in an update
PLANS = {
    "fsdp 2": (ParallelConfig(1, 2), 2),
    "tp 2": (ParallelConfig(1, 1, tp=2), 2),
    "cp 2": (ParallelConfig(1, 1, cp=2), 2),
    "ep 2": (ParallelConfig(1, 2, ep=2), 2),
    "pp 2 1f1b": (ParallelConfig(1, 1, pp=2), 2),
    "fsdp 4": (ParallelConfig(1, 4), 4),
    "ep 4 over tp 2": (ParallelConfig(1, 2, ep=4, tp=2, expert_tp=False), 4),
    "cp 2 x tp 2": (ParallelConfig(1, 1, cp=2, tp=2, remat=Remat.selective), 4),
    "pp 2 zbv x fsdp 2": (ParallelConfig(1, 2, pp=2, pipeline=PipelineConfig(ScheduleName.zbv)), 4),
    "pp 2 in two runs": (ParallelConfig(1, 1, pp=2, pipeline=PipelineConfig(ScheduleName["1f1b"], 2)), 2),
    "fsdp 2 again": (ParallelConfig(1, 2, remat=Remat.block), 2),
}
FAST = [("fsdp 2", "global"), ("pp 2 1f1b", "global"), ("tp 2", "micro"), ("cp 2", "micro"), ("ep 2", "micro")]


def model(kind):
    """V3 with two depths of multi-token prediction, and a loss over the global batch or one of each micro-batch."""
    more = SWITCH if kind == "global" else DEVICES | {"router__switch_loss": {"weight": 0.02, "scope": "micro_batch"}}
    mla = {"n_heads": 4, "q_rank": 10, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5}
    moe = {"n_experts": 8, "top_k": 3, "d_expert": 8, "d_shared": 12, "router__n_groups": 4, "router__top_groups": 2}
    moe |= {"router__balance_rate": 0.01, "router__balance_loss": 0.01} | more
    return shrunk("deepseek_v3_tiny", {"mla": mla, "mlp": {"d_ff": 24}, "moe": moe}, n_mtp=2)


def train(kind, plan):
    """Losses, norms and loads of three updates, and what was updated."""
    torch.set_num_threads(1)
    case = Case(model(kind), plan, micro=MICRO)
    return [case.update(step) for step in range(3)], case.tensors()


@functools.cache
def alone(kind):
    return train(kind, ALONE)


def marked():
    for plan in PLANS:
        for kind in ("global", "micro"):
            yield pytest.param(plan, kind, marks=() if (plan, kind) in FAST else pytest.mark.slow)


@pytest.mark.parametrize("plan, kind", list(marked()))
def test_balance_losses_do_not_depend_on_the_plan(plan, kind):
    config, ranks = PLANS[plan]
    want, tensors = alone(kind)
    results = run(train, world_size=ranks, timeout=300, kind=kind, plan=config)
    for numbers, _ in results:
        for got, exact in zip(numbers, want, strict=True):
            assert got == pytest.approx(exact, rel=1e-9, abs=1e-15)
    print(f"| {plan} | {kind} | {same(merged(each for _, each in results), tensors):.0e} |")


@pytest.mark.parametrize("kind", ["global", "micro"])
@pytest.mark.parametrize("remat", Remat)
def test_every_choice_counts_once(kind, remat):
    """Neither a forward that counts ahead nor one that is computed again adds to the load."""
    case = Case(model(kind), ParallelConfig(1, 1, remat=remat), micro=MICRO)
    layers = sum(layer.moe is not None for layer in case.config.layers) + case.config.n_mtp
    for step in range(2):
        losses = case.update(step)
        loads = torch.tensor(losses[-layers * 8 :]).view(layers, 8)
        assert loads.sum(dim=1).tolist() == [ROWS * LENGTH * 3] * layers
    assert min(losses[3:5]) > 0  # balance and z
