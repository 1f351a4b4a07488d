"""What blocks compute again changes no bit of a loss or gradient, holds less, and combines with sharding."""

import pytest
import torch
from distributed import run
from micro import alone, loss, made, outcome, small
from models import compose
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from parallel.config import ParallelConfig, Remat, Reshard
from parallel.config_fit import Sizes
from parallel.mesh import lay_out

FAMILIES = ["llama3_tiny", "deepseek_v3_tiny", "gpt_oss_tiny", "qwen3_next_tiny", "grok2_tiny"]
RECOMPUTED = [Remat.block, Remat.selective]


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_computed_again_changes_no_bit_and_no_name(name):
    config = small(name)
    model = made(config, alone(), ParallelConfig())
    want = outcome(model, [1, 2])
    nothing = {key for key, tensor in want.items() if not tensor.any()}
    unbalanced = {
        key for key in want if key.endswith(".balance") and name != "deepseek_v3_tiny"
    }  # the others' rate is 0
    assert nothing <= unbalanced, nothing
    for how in RECOMPUTED:
        changed = made(config, alone(), ParallelConfig(remat=how))
        assert [*changed.state_dict()] == [*model.state_dict()]
        assert_same_bits(outcome(changed, [1, 2]), want)


def sharded(name, plans):
    """Under each plan on two ranks: one process's outcome of both ranks' rows must be the sum."""
    rank, config = torch.distributed.get_rank(), small(name)
    results = []
    for plan in plans:
        model = made(config, lay_out(Sizes(1, 2), device=torch.device("cpu"), rank=rank), plan)
        with torch.no_grad():
            loss(model, 9)  # an evaluation, after which parameters may stay gathered
        results.append((outcome(model, [rank, rank + 2]), [*model.state_dict()]))
    return results


@pytest.mark.parametrize("name", FAMILIES[:4])
def test_under_fsdp_recomputing_resharding_and_offloading_change_no_bit_and_no_name(name):
    plans = [ParallelConfig(remat=how, reshard=Reshard.never) for how in RECOMPUTED]
    plans += [ParallelConfig(reshard=Reshard.always, offload=True)]
    plans += [ParallelConfig(remat=how, reshard=Reshard.always, offload=True) for how in RECOMPUTED]
    for results in run(sharded, world_size=2, name=name, plans=[ParallelConfig(), *plans]):
        (want, names), *others = results
        for got, their_names in others:
            assert their_names == names
            assert_same_bits(got, want)


def held(how):
    """Bytes of activations between forward and backward."""
    model = made(compose("llama3_tiny", n_layers=8, vocab_size=64), alone(), ParallelConfig(remat=how))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        losses = loss(model, 0, length=64)
        (memory,) = tracker.get_tracker_snapshot("current").values()
        losses.sum().backward()
    return next(size for kind, size in memory.items() if str(kind).endswith("ACT"))


def test_what_is_held_for_the_backward_is_least_with_block_and_less_with_selective_than_with_none():
    none, selective, block = (held(how) for how in (Remat.none, Remat.selective, Remat.block))
    assert block < 0.2 * none
    assert 0.5 * none < selective < 0.8 * none


def flops(name, how):
    model = made(small(name), alone(), ParallelConfig(remat=how))
    with FlopCounterMode(display=False) as counter:
        loss(model, 0).sum().backward()
    return counter.get_total_flops()


def test_selective_multiplies_nothing_again_where_attention_is_fused():
    assert flops("llama3_tiny", Remat.selective) == flops("llama3_tiny", Remat.none) < flops("llama3_tiny", Remat.block)
