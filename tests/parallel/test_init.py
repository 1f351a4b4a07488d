"""Fresh models on several ranks: bitwise those of one process, and made in the memory of each rank's share."""

import re
from pathlib import Path

import pytest
import torch
from distributed import run
from models import compose

from parallel import reduce
from parallel.apply import build, fill_fresh
from parallel.config import Dtype, PrecisionConfig
from parallel.config_fit import Sizes
from parallel.mesh import lay_out, open_mesh
from zoo import init

PRECISION = PrecisionConfig(Dtype.fp32, Dtype.fp32)
MIB = 2**20


def spread(sizes):
    """The mesh of a process that the test's harness has put into a group already."""
    if sizes.dp == 1:
        return open_mesh(sizes, rank=0, local_rank=0)
    return lay_out(sizes, device=torch.device("cpu"), rank=torch.distributed.get_rank())


def fresh(names, sizes):
    """Whole state of each model; no number may be drawn that this rank does not keep."""
    states: list[dict[str, torch.Tensor]] = []
    drawn: list[int] = []
    words = init._words

    def counted(*args, **kwargs):
        result = words(*args, **kwargs)
        drawn[-1] += len(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "_words", counted)
        for name in names:
            drawn.append(0)
            model = build(compose(name), mesh=spread(sizes), precision=PRECISION)
            fill_fresh(model, seed=3)
            random = [p for key, p in model.named_parameters() if init._constant(key, model.config) is None]
            assert drawn[-1] == sum(reduce.local(p).numel() for p in random), name
            states.append({key: reduce.whole(value.detach()).clone() for key, value in model.state_dict().items()})
    return states


@pytest.mark.parametrize("replicate, shard", [(1, 2), (1, 3), (2, 2)])
def test_every_plan_starts_bitwise_as_one_process_and_draws_its_part_alone(replicate, shard):
    names = ["deepseek_v3_tiny", "qwen3_next_tiny", "gpt_oss_tiny", "olmo2_tiny", "gpt2_tiny", "gemma3_tiny"]
    alone = fresh(names, Sizes(1, 1))
    for states in run(fresh, world_size=replicate * shard, names=names, sizes=Sizes(replicate, shard)):
        for name, state, expected in zip(names, states, alone, strict=True):
            assert state.keys() == expected.keys()
            assert not [key for key in state if not torch.equal(state[key], expected[key])], name


def memory(key):
    """Of this process, in bytes."""
    return int(re.search(key + r":\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measured(sizes):
    """Bytes of this rank's parameters, and what making them took at most."""
    mesh = spread(sizes)
    fill_fresh(build(compose("llama3_tiny"), mesh=mesh, precision=PRECISION), seed=1)  # loads what loads but once
    config = compose("llama3_tiny", vocab_size=40_001, d_model=512, blocks__dense__mlp__d_ff=3000)
    before = memory("RssAnon")
    files = memory("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model = build(config, mesh=mesh, precision=PRECISION)
    fill_fresh(model, seed=1)
    parameters = sum(reduce.local(p).numel() * p.element_size() for p in model.parameters())
    return parameters, memory("VmHWM") - files - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_a_rank_makes_its_half_in_the_memory_of_its_half():
    for parameters, peak in run(measured, world_size=2, sizes=Sizes(1, 2)):
        assert 90 * MIB < parameters < 150 * MIB
        print(f"{peak / parameters:.3f} of the share of {parameters / MIB:.0f} MiB")
        assert 0.9 * parameters < peak <= 1.2 * parameters, f"{peak / parameters:.3f}"
