"""Models cut into pipeline stages, without building one but a tiny one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PUBLISHED, compose

from parallel.config import PipelineConfig, ScheduleName
from parallel.config_fit import stages_a_rank
from parallel.partition import balanced, costs, parts, rank_of, stages_of
from zoo.count import flops_per_token
from zoo.decoder import Decoder

SCHEDULES = [PipelineConfig(schedule=schedule, virtual=3) for schedule in ScheduleName]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_no_cut_has_a_smaller_largest_run_nor_then_a_smaller_sum_of_squares(sizes, n):
    n = min(n, len(sizes))

    def worth(ends):
        sums = [sum(sizes[a:b]) for a, b in itertools.pairwise([0, *ends])]
        return max(sums), sum(x * x for x in sums)

    ends = balanced(sizes, n=n)
    assert len(ends) == n and ends == sorted(set(ends)) and ends[0] > 0 and ends[-1] == len(sizes)
    every = itertools.combinations(range(1, len(sizes)), n - 1)
    assert worth(ends) == min(worth([*cut, len(sizes)]) for cut in every)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_part_of_every_model_is_in_one_stage_in_order(name):
    config = compose(name)
    for n in (1, 2, 5, 16, config.n_layers + 2):
        cut = parts(config, n_stages=min(n, config.n_layers + 2), seq_len=4096)
        assert [part.begins for part in cut] == [i == 0 for i in range(len(cut))]
        assert [part.ends for part in cut] == [i == len(cut) - 1 for i in range(len(cut))]
        assert [i for part in cut for i in range(part.first, part.stop)] == list(range(config.n_layers))
    with pytest.raises(ValueError, match="layers, embedding and head"):
        parts(config, n_stages=config.n_layers + 3, seq_len=4096)


@pytest.mark.parametrize("name", ["llama31_405b", "deepseek_v3_671b", "gemma3_27b"])
def test_costs_are_a_third_of_what_training_needs(name):
    config = compose(name)
    found = sum(costs(config, seq_len=4096))
    assert found == pytest.approx(flops_per_token(config, seq_len=4096).total / 3, rel=1e-4)


def test_the_head_counts():
    config = compose("llama3_8b")  # its head is worth 2.1 layers, its embedding next to nothing
    assert [part.stop - part.first for part in parts(config, n_stages=4, seq_len=8192)] == [8, 9, 9, 6]


@pytest.mark.parametrize("plan", SCHEDULES, ids=lambda plan: plan.schedule)
def test_each_stage_is_on_one_rank_and_neighbours_in_a_v_share_one(plan):
    config, pp = compose("llama3_8b"), 4
    n = pp * stages_a_rank(plan)
    mine = [stages_of(config, plan, pp=pp, rank=rank, seq_len=64) for rank in range(pp)]
    assert sorted(number for stages in mine for number in stages) == list(range(n))
    cut = parts(config, n_stages=n, seq_len=64)
    for rank, stages in enumerate(mine):
        assert list(stages) == sorted(stages)
        assert all(part == cut[number] for number, part in stages.items())
        assert all(rank_of(number, plan.schedule, pp=pp) == rank for number in stages)
    if plan.schedule in (ScheduleName.zbv, ScheduleName.dualpipev):
        assert [list(stages) for stages in mine] == [[0, 7], [1, 6], [2, 5], [3, 4]]


@pytest.mark.parametrize("name", ["deepseek_v3_tiny", "gemma3_tiny", "gpt2_tiny"])
def test_stages_together_have_the_parameters_of_the_whole_model_and_a_copy_where_two_need_it(name):
    config = compose(name)
    with torch.device("meta"):
        whole = {key: x.shape for key, x in Decoder(config).named_parameters()}
        for n in (2, 3, config.n_layers + 2):
            stages = [Decoder(config, part) for part in parts(config, n_stages=n, seq_len=64)]
            names = [key for stage in stages for key, _ in stage.named_parameters()]
            copies = ["embed.weight"] if config.tied or config.n_mtp else []
            assert sorted(names) == sorted([*whole, *copies])
            assert all(x.shape == whole[key] for stage in stages for key, x in stage.named_parameters())
