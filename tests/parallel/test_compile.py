"""Compiled blocks: the losses and gradients of blocks as they are, or one line that says why not."""

import pytest
import torch
from distributed import run
from micro import alone, loss, made, outcome, small
from models import SHIPPED
from torch._dynamo.utils import counters

from parallel.config import ParallelConfig, Remat, Reshard
from parallel.config_fit import Sizes
from parallel.mesh import MeshError, lay_out
from zoo.attention import Attention

TRACED = "aot_eager_decomp_partition"  # traces, differentiates and decomposes as inductor does, and generates no code
EAGER, PLAIN = ParallelConfig(), ParallelConfig(compile=True)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def assert_close(got, want):
    largest = max(tensor.abs().max() for tensor in want.values())
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= 1e-9 * tensor.abs().max() + 1e-12 * largest, name


def compare(name, plan, compiler):
    config = small(name)
    model = made(config, alone(), plan, compiler)
    assert_close(outcome(model, [1, 2]), outcome(made(config, alone(), EAGER), [1, 2]))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == len({id(layer) for layer in config.layers})
    return model


@pytest.mark.parametrize("name, remat", [("llama3_tiny", Remat.none), ("deepseek_v3_tiny", Remat.selective)])
def test_a_compiled_model_has_the_losses_and_gradients_of_one_that_is_not(name, remat):
    model = compare(name, ParallelConfig(compile=True, remat=remat), TRACED)
    before = dict(counters["stats"])
    with torch.no_grad():
        loss(model, 3, length=7)
    assert dict(counters["stats"]) == before, "an evaluation was compiled"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("_tiny")])
def test_every_family_compiles_without_a_break(name):
    compare(name, PLAIN, TRACED)


@pytest.mark.slow
@pytest.mark.parametrize("remat", Remat)
@pytest.mark.parametrize("name", ["gpt_oss_tiny", "qwen3_next_tiny"])
def test_every_way_to_recompute_can_be_compiled(name, remat):
    compare(name, ParallelConfig(compile=True, remat=remat), TRACED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3_tiny", "deepseek_v3_tiny"])
def test_generated_code_has_the_same_losses_and_gradients(name):
    compare(name, ParallelConfig(compile=True, remat=Remat.selective), "inductor")


def sharded(plans):
    rank, config = torch.distributed.get_rank(), small("llama3_tiny")
    results = []
    for plan in plans:
        model = made(config, lay_out(Sizes(1, 2), device=torch.device("cpu"), rank=rank), plan, TRACED)
        results.append((outcome(model, [rank, rank + 2]), [*model.state_dict()], counters["stats"]["unique_graphs"]))
    return results


def test_compiled_sharded_recomputed_and_offloaded_blocks_have_the_same_gradients_and_names():
    plan = ParallelConfig(compile=True, remat=Remat.block, reshard=Reshard.never, offload=True)
    for (want, names, none), (got, their_names, graphs) in run(sharded, world_size=2, plans=[EAGER, plan]):
        assert (none, graphs) == (0, 1) and their_names == names
        assert_close(got, want)


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    def forward(self, x, context):
        torch._dynamo.graph_break()
        return x

    monkeypatch.setattr(Attention, "forward", forward)
    model = made(small("llama3_tiny"), alone(), PLAIN, TRACED)
    with pytest.raises(MeshError) as caught:
        loss(model, 1)
    said = str(caught.value)
    assert said.startswith("parallel.compile=true: torch.compile cannot do this model: ") and "\n" not in said
