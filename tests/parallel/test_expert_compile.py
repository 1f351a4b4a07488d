"""Compiled blocks whose tokens travel: updates of blocks as they are, and which parts are compiled."""

from dataclasses import replace

import pytest
import torch
from distributed import run
from sharing import Case, same

from parallel.config import ParallelConfig, Remat

TRACED = "aot_eager_decomp_partition"


def updates(name, plan):
    """Numbers and tensors of two updates, as the model is and compiled, and what was compiled."""
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    found = []
    for each in (replace(plan, compile=False, remat=Remat.none), plan):
        case = Case(name, each, compiler=TRACED)
        numbers = [case.update(step) for step in range(2)]
        found.append((numbers, case.tensors()))
    return *found, counters["stats"]["unique_graphs"], {reason.split("\n")[0] for reason in counters["graph_break"]}


def compare(name, plan):
    for (numbers, want), (their_numbers, got), graphs, breaks in run(
        updates, world_size=2, timeout=300, name=name, plan=plan
    ):
        torch.testing.assert_close(torch.tensor(their_numbers), torch.tensor(numbers), rtol=1e-9, atol=1e-12)
        same(got, want)
        assert graphs > 0
        assert all("skip" in reason.lower() for reason in breaks), breaks  # of what was asked to be left alone


@pytest.mark.slow
@pytest.mark.parametrize("remat", Remat)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_layers_with_experts_elsewhere_can_be_compiled(name, remat):
    compare(name, ParallelConfig(dp_replicate=1, dp_shard=2, ep=2, compile=True, remat=remat))


SLOW = [pytest.param(remat, marks=pytest.mark.slow) for remat in Remat if remat is not Remat.none]


@pytest.mark.parametrize("remat", [Remat.none, *SLOW])
def test_layers_with_whole_experts_elsewhere_can_be_compiled(remat):
    plan = ParallelConfig(dp_replicate=1, dp_shard=1, tp=2, ep=2, expert_tp=False, compile=True, remat=remat)
    compare("qwen3_moe", plan)
