"""QK-Clip under every plan: three updates in float64 against one process, with heads above tau in each of them."""

import functools

import pytest
import torch
from distributed import run
from sharing import ALONE, MUONCLIP, Case, merged, same

from parallel.config import ContextMethod, ParallelConfig, PipelineConfig, Remat, ScheduleName

UPDATES = 3


def cut(method, **more):
    return ParallelConfig(1, 1, cp=2, context=ContextMethod(method), **more)


PLANS = {
    "fsdp 2": (ParallelConfig(1, 2), 2),
    "tp 2": (ParallelConfig(1, 1, tp=2), 2),
    "cp 2 gather": (cut("gather"), 2),
    "cp 2 ulysses": (cut("ulysses"), 2),
    "cp 2 ring": (cut("ring"), 2),
    "cp 2 ring, recomputed": (cut("ring", remat=Remat.selective), 2),
    "pp 2 1f1b": (ParallelConfig(1, 1, pp=2), 2),
    "ep 2": (ParallelConfig(1, 2, ep=2), 2),
    "hsdp 2 x 2": (ParallelConfig(2, 2), 4),
    "tp 4": (ParallelConfig(1, 1, tp=4), 4),  # of two key heads
    "tp 2 x fsdp 2": (ParallelConfig(1, 2, tp=2), 4),
    "ep 2 x tp 2": (ParallelConfig(1, 2, ep=2, tp=2), 4),
    "tp 2 x cp 2 ulysses": (cut("ulysses", tp=2), 4),
    "pp 2 zbv x fsdp 2": (ParallelConfig(1, 2, pp=2, pipeline=PipelineConfig(ScheduleName.zbv)), 4),
}
NAMES = ("llama3", "deepseek_v3", "gpt_oss")
FAST = {"tp 2": "gpt_oss", "cp 2 ulysses": "llama3", "cp 2 ring": "deepseek_v3"}


def train(name, plan):
    """Losses, norms, loads and largest logits of three updates; heads clipped in each; and what was updated."""
    torch.set_num_threads(1)
    case, numbers, clipped = Case(name, plan, optim_config=MUONCLIP), [], []
    for step in range(UPDATES):
        numbers.append(case.update(step))
        clipped.append(case.attention.clipped.item())
    return numbers, clipped, case.tensors()


@functools.cache
def alone(name):
    return train(name, ALONE)


def marked():
    for plan, (config, _) in PLANS.items():
        for name in NAMES:
            refused = (config.ep > 1 and name == "llama3") or ("ring" in plan and name == "gpt_oss")
            if not refused:
                slow = FAST.get(plan) != name
                yield pytest.param(plan, name, marks=pytest.mark.slow) if slow else (plan, name)


@pytest.mark.parametrize("plan, name", list(marked()))
def test_three_updates_are_those_of_one_process(plan, name):
    config, ranks = PLANS[plan]
    want, heads, tensors = alone(name)
    assert min(heads) > 0
    results = run(train, world_size=ranks, timeout=300, name=name, plan=config)
    for numbers, clipped, _ in results:
        assert clipped == heads
        for got, exact in zip(numbers, want, strict=True):
            assert got == pytest.approx(exact, rel=1e-9, abs=1e-15)
    print(f"| {plan} | {name} | {same(merged(each for *_, each in results), tensors):.0e} |")
