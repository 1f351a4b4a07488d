"""Random plans × families × small shapes against one process: losses, the norm, and every parameter's gradient.

What differs is shrunk to the smallest layout that still differs. Megatron-LM#7452 found silent errors of gradients so.
"""

from dataclasses import replace

import pytest
import torch
from distributed import run
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sharing import ADAMW, EXACT, FAMILIES, SETTINGS, VOCAB, joined, merged, random_value, same

from conf.fitting import check_model
from data.batch import Batch
from parallel import reduce
from parallel.apply import build, fill
from parallel.config import ContextMethod, ParallelConfig, PipelineConfig, Remat, Reshard, ScheduleName
from parallel.config_fit import check_pipeline, fit
from trainer.engine import TorchEngine, count

ALONE = ParallelConfig(1, 1)
NONE = -100


def batch(config, *, seed, rows, length, breaks):
    """Rows of uneven documents, of which about ``breaks`` in ten tokens begin one; some rows have no target."""
    generator = torch.Generator().manual_seed(seed)
    depths = range(1, config.n_mtp + 1)
    tokens = torch.randint(0, VOCAB, (rows, length + config.n_mtp + 1), generator=generator)
    documents = (torch.rand(tokens.shape, generator=generator) < breaks / 10).cumsum(1)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = torch.arange(tokens.shape[1]).expand_as(documents)
    positions = places - places.where(begins, 0).cummax(dim=1).values
    empty = torch.rand(rows, 1, generator=generator) < 0.3

    def target(ahead):
        there = slice(ahead, ahead + length)
        counted = (documents[:, there] == documents[:, :length]) & ~empty
        return tokens[:, there].where(counted, NONE)

    none = torch.zeros(rows, 0, length, dtype=torch.int64)
    return Batch(
        tokens=tokens[:, :length],
        targets=target(1),
        positions=positions[:, :length],
        documents=documents[:, :length],
        mtp_tokens=torch.stack([tokens[:, k : k + length] for k in depths], dim=1) if depths else none,
        mtp_targets=torch.stack([target(k + 1) for k in depths], dim=1) if depths else none,
    )


def gradients(name, plan, shape, micro):
    """Losses and the norm of one update, and gradients as whole tensors, in micro-batches of ``micro`` rows."""
    torch.set_num_threads(1)
    config = FAMILIES[name]()
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = joined(fit(plan, world_size=world_size))
    model = build(config, mesh=mesh, precision=EXACT, plan=plan, seq_len=shape["length"])
    fill(reduce.views(model, model.state_dict()), random_value)
    engine = TorchEngine(model, mesh=mesh, train=SETTINGS, optim_config=ADAMW)
    engine.filled()
    whole, share = batch(config, **shape), shape["rows"] // mesh.sizes.dp
    starts = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, micro)
    batches = [Batch(**{key: x[start : start + micro] for key, x in vars(whole).items()}) for start in starts]
    terms = engine.forward_backward(batches, count(batches, mesh))
    found = {}
    for key, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[key.removesuffix("@copy")] = reduce.whole(reduce.view(model, key, gradient)).clone()
    return torch.stack([*terms.losses, terms.balance, terms.router_z, engine.squares().sum().sqrt()]), found


@st.composite
def layouts(draw, ranks):
    """A legal plan of at most so many ranks, a family, a shape and how its rows are accumulated."""
    sizes = {axis: draw(st.sampled_from([1, 2])) for axis in ("pp", "dp_replicate", "dp_shard", "cp")}
    sizes["tp"] = draw(st.sampled_from([1, 2, 4]))
    world_size = sizes["pp"] * sizes["dp_replicate"] * sizes["dp_shard"] * sizes["cp"] * sizes["tp"]
    assume(1 < world_size <= ranks)
    expert_tp = draw(st.booleans())
    plan = ParallelConfig(
        **sizes,
        ep=draw(st.sampled_from([1, 2, 4])),
        expert_tp=expert_tp,
        context=draw(st.sampled_from(ContextMethod)) if sizes["cp"] > 1 else ContextMethod.gather,
        remat=draw(st.sampled_from(Remat)),
        reshard=draw(st.sampled_from(Reshard)),
    )
    name = draw(st.sampled_from(sorted(FAMILIES)))
    micro, batches = draw(st.sampled_from([1, 2])), draw(st.integers(1, 4))
    if sizes["pp"] > 1:
        runs = draw(st.sampled_from([n for n in (1, 2) if batches % n == 0]))
        schedule = draw(st.sampled_from(ScheduleName))
        plan = replace(plan, pipeline=PipelineConfig(schedule, batches // runs, draw(st.integers(2, 2))))
    length = 2 * sizes["cp"] * sizes["tp"] * draw(st.integers(1, 3))
    rows = sizes["dp_replicate"] * sizes["dp_shard"] * micro * batches
    shape = {"seed": draw(st.integers(0, 99)), "rows": rows, "length": length, "breaks": draw(st.integers(0, 6))}
    config = FAMILIES[name]()
    try:
        fitted = fit(plan, world_size=world_size)
        check_model(config, plan=plan, sizes=fitted, seq_len=length)
        check_pipeline(plan, n_layers=config.n_layers, accumulation=batches)
    except ValueError:
        assume(False)
    return world_size, {"name": name, "plan": plan, "shape": shape, "micro": micro}


def compare(layout):
    world_size, given = layout
    numbers, want = gradients(**given | {"plan": ALONE})
    results = run(gradients, world_size=world_size, timeout=120, **given)
    for theirs, _ in results:
        torch.testing.assert_close(theirs, numbers, rtol=1e-9, atol=1e-14)
    same(merged(found for _, found in results), want)


CHECKS = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]


@given(layouts(ranks=4))
@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=CHECKS)
def test_any_plan_has_the_gradients_of_one_process(layout):
    compare(layout)


@pytest.mark.slow
@given(layouts(ranks=8))
@settings(max_examples=200, deadline=None, suppress_health_check=CHECKS)
def test_any_larger_plan_has_the_gradients_of_one_process(layout):
    compare(layout)
