"""Every plan × every family: three updates in float64 against one process, and what is refused. Prints its table."""

import functools

import pytest
import torch
from distributed import run
from sharing import ALONE, FAMILIES, LENGTH, Case, merged, rows, same

from conf.fitting import check_model
from parallel.config import ContextMethod, ParallelConfig, PipelineConfig, ScheduleName
from parallel.config_fit import fit
from zoo.generate import generate


def staged(schedule, microbatches=4, **axes):
    """Two stages a rank of pp go through twice an update: 8 rows are two times four micro-batches."""
    return ParallelConfig(1, axes.pop("dp_shard", 1), pp=2, pipeline=PipelineConfig(schedule, microbatches), **axes)


def cut(method):
    return ParallelConfig(1, 1, cp=2, context=ContextMethod(method))


PLANS = {
    "fsdp 2": (ParallelConfig(1, 2), 2),
    "hsdp 2 x 2": (ParallelConfig(2, 2), 4),
    "tp 2": (ParallelConfig(1, 1, tp=2), 2),
    "tp 4": (ParallelConfig(1, 1, tp=4), 4),
    "tp 2 x fsdp 2": (ParallelConfig(1, 2, tp=2), 4),
    "pp 2 1f1b": (staged(ScheduleName["1f1b"]), 2),
    "pp 2 interleaved": (staged(ScheduleName.interleaved), 2),
    "pp 2 zbv": (staged(ScheduleName.zbv), 2),
    "pp 2 dualpipev": (staged(ScheduleName.dualpipev), 2),
    "ep 2": (ParallelConfig(1, 2, ep=2), 2),
    "ep 4": (ParallelConfig(1, 4, ep=4), 4),
    "ep 2 x fsdp 4": (ParallelConfig(1, 4, ep=2), 4),
    "ep 2 x tp 2": (ParallelConfig(1, 2, ep=2, tp=2), 4),
    "ep 4 over tp 2": (ParallelConfig(1, 2, ep=4, tp=2, expert_tp=False), 4),
    "cp 2 gather": (cut("gather"), 2),
    "cp 2 ulysses": (cut("ulysses"), 2),
    "cp 2 ring": (cut("ring"), 2),
    "pp 2 x tp 2 x fsdp 2": (staged(ScheduleName["1f1b"], 2, tp=2, dp_shard=2), 8),
    "pp 2 x cp 2 x tp 2 x ep 2": (staged(ScheduleName["1f1b"], cp=2, tp=2, ep=2), 8),
}
NAMES = (
    "llama3", "deepseek_v3", "qwen3_moe", "gemma3", "llama4_maverick", "gpt_oss", "qwen3_next", "olmo2", "grok2",
)  # fmt: skip
DENSE = {"llama3", "gemma3", "olmo2"}
REFUSED = {(plan, name) for plan, (config, _) in PLANS.items() for name in DENSE if config.ep > 1}
REFUSED |= {("cp 2 ring", "gpt_oss"), ("cp 2 ring", "grok2")}  # sinks; softcaps
FAST = {
    "tp 2": ["deepseek_v3"], "pp 2 zbv": ["gemma3"], "ep 2": ["qwen3_moe"], "cp 2 gather": ["qwen3_next", "gpt_oss"],
    "cp 2 ring": ["deepseek_v3"], "cp 2 ulysses": ["llama3"], "pp 2 dualpipev": ["deepseek_v3"],
    "pp 2 x cp 2 x tp 2 x ep 2": ["deepseek_v3"],
}  # fmt: skip


def train(names, plan):
    """Of each family: losses, norms and loads of three updates, what was updated, and what the model then says."""
    torch.set_num_threads(1)
    results = {}
    for name in names:
        case = Case(name, plan)
        numbers = [case.update(step) for step in range(3)]
        said = {}
        for length in (11, LENGTH):
            with torch.no_grad():
                said[f"logits/{length}"] = case.model(rows(7, 0).tokens[:, :length]).clone()
        sample = generate(case.model, prompt=[3, 1, 4], n_tokens=4, device=case.mesh.device)
        said["sample"] = torch.tensor(sample)
        said["validation"] = torch.tensor(case.evaluate(5), dtype=torch.float64)
        results[name] = numbers, said, case.tensors()
    return results


@functools.cache
def alone(name):
    return train([name], ALONE)[name]


def compared(plan, names):
    """The worst relative difference of each family's numbers and tensors from one process."""
    config, ranks = PLANS[plan]
    results, far = run(train, world_size=ranks, timeout=900, names=names, plan=config), {}
    for name in names:
        want, said, tensors = alone(name)
        ours = [result[name] for result in results]
        assert all(numbers == ours[0][0] for numbers, _, _ in ours), f"{plan} {name}: ranks differ"
        got, want = (torch.tensor(numbers, dtype=torch.float64) for numbers in (ours[0][0], want))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)
        gap = ((got - want).abs() / want.abs().clamp(min=1e-30)).max().item()
        far[name] = max(gap, same(merged(each for _, _, each in ours), tensors))
        for _, theirs, _ in ours:  # experts multiply rows of several ranks at once: not bitwise the same on each
            same(theirs, said)
        print(f"| {plan} | {name} | {far[name]:.0e} |")
    return far


def marked():
    for plan, names in FAST.items():
        yield plan, names
    for plan in PLANS:
        names = [name for name in NAMES if (plan, name) not in REFUSED and name not in FAST.get(plan, [])]
        yield pytest.param(plan, names, marks=pytest.mark.slow)


@pytest.mark.parametrize("plan, names", list(marked()), ids=str)
def test_a_plan_updates_as_one_process_does(plan, names):
    far = compared(plan, names)
    assert far.keys() == set(names) and max(far.values()) < 1e-9


@pytest.mark.parametrize("plan, name", [(plan, name) for plan in PLANS for name in NAMES])
def test_what_a_plan_cannot_do_is_refused_by_name_and_nothing_else(plan, name):
    config, ranks = PLANS[plan]
    sizes = fit(config, world_size=ranks)
    if (plan, name) not in REFUSED:
        check_model(FAMILIES[name](), plan=config, sizes=sizes, seq_len=LENGTH)
        return
    with pytest.raises(ValueError, match=r"^parallel\.\w+="):
        check_model(FAMILIES[name](), plan=config, sizes=sizes, seq_len=LENGTH)
