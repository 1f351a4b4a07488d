"""What ranks that share layers hold: their part from the start, in checkpoints of any plan, and nothing more."""

from dataclasses import replace

import pytest
import torch
from distributed import run
from saving import alone, grouped
from sharing import EXACT, FAMILIES, LENGTH, ROWS, SETTINGS, Case, joined, random_value, rows, same

from parallel import reduce
from parallel.apply import build, fill, fill_fresh
from parallel.config import Dtype, ParallelConfig, PrecisionConfig, Remat
from parallel.config_fit import fit

SINGLE, TP2, TP4 = ParallelConfig(1, 1), ParallelConfig(1, 1, tp=2), ParallelConfig(1, 1, tp=4)
MIXED = ParallelConfig(1, 2, tp=2)
HYBRID = ParallelConfig(2, 1, tp=2)


def world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def fresh(name, plan):
    """First values as whole tensors, and how many numbers this rank holds."""
    config = FAMILIES[name]()
    mesh = joined(fit(plan, world_size=world_size()))
    model = build(config, mesh=mesh, precision=PrecisionConfig(Dtype.fp32, Dtype.fp32), plan=plan)
    fill_fresh(model, seed=3)
    held = sum(reduce.local(p).numel() for p in model.parameters())
    values = reduce.views(model, dict(model.named_parameters()))
    return {key: reduce.whole(value.detach()).clone() for key, value in values.items()}, held


@pytest.mark.parametrize("name, plan, ranks", [("llama3", TP4, 4), ("qwen3_next", MIXED, 4), ("deepseek_v3", TP2, 2)])
def test_first_values_are_bitwise_those_of_one_process_and_no_rank_holds_more_than_its_part(name, plan, ranks):
    want, numbers = fresh(name, SINGLE)
    for got, held in run(fresh, world_size=ranks, name=name, plan=plan):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert held < 1.35 * numbers / ranks  # norms, routers and a few copies are whole


def read_back(sizes, plan):
    """Whether what a model with each of some vocabularies was filled with is what its views give, part and whole."""
    results = []
    for vocab_size in sizes:
        config = replace(FAMILIES["llama3"](), vocab_size=vocab_size, n_layers=1)
        mesh = joined(fit(plan, world_size=world_size()))
        model = build(config, mesh=mesh, precision=EXACT, plan=plan)
        parameters = dict(model.named_parameters())
        fill(reduce.views(model, parameters), random_value)
        for name, x in reduce.views(model, parameters).items():
            want = random_value(name, x.shape)
            kept = torch.equal(reduce.local(x), want[reduce.part(x)]) and torch.equal(reduce.whole(x), want)
            results.append((vocab_size, name, kept))
    return results


@pytest.mark.parametrize("plan", [MIXED, TP4])
def test_what_is_cut_twice_and_unevenly_reads_back(plan):
    sizes = [3, 5, 6, 7, 9, 11] if plan is MIXED else [4, 7, 11]
    for results in run(read_back, world_size=4, sizes=sizes, plan=plan):
        assert [result for result in results if not result[2]] == []


def part_of_a_run(name, plan, folder, steps):
    """Go on from a folder's latest checkpoint for some updates, save, and give the whole state."""
    torch.set_num_threads(1)
    case = Case(name, plan)
    checkpoints = (grouped if torch.distributed.is_initialized() else alone)(folder)
    progress = checkpoints.restore(case.engine.state())
    first = 0 if progress is None else progress["step"]
    numbers = [case.update(step) for step in range(first, first + steps)]
    checkpoints.save(first + steps, case.engine.state(), progress={"step": first + steps})
    return numbers, case.tensors()


PLANS = [(TP4, 4), (SINGLE, 1), (MIXED, 4), (TP2, 2), (HYBRID, 4)]


@pytest.mark.parametrize("name", ["llama3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_checkpoint_of_any_plan_goes_on_under_any_other(name, tmp_path):
    numbers, tensors = part_of_a_run(name, SINGLE, tmp_path / "alone", steps=len(PLANS))
    for step, (plan, ranks) in enumerate(PLANS):
        given = {"name": name, "plan": plan, "folder": tmp_path / "moved", "steps": 1}
        results = run(part_of_a_run, world_size=ranks, **given) if ranks > 1 else [part_of_a_run(**given)]
        for (got,), _ in results:
            assert got == pytest.approx(numbers[step], rel=1e-9), plan
    for _, got in results:
        same(got, tensors)


def recomputed(name, plans):
    torch.set_num_threads(1)
    results = []
    for plan in plans:
        case = Case(name, plan)
        results.append(([case.update(step) for step in range(2)], case.tensors()))
    return results


@pytest.mark.parametrize("name", ["llama3", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_blocks_that_compute_again_gather_again(name):
    plans = [TP2, *(ParallelConfig(1, 1, tp=2, remat=remat) for remat in (Remat.block, Remat.selective))]
    for (numbers, tensors), *others in run(recomputed, world_size=2, name=name, plans=plans):
        for their_numbers, their_tensors in others:
            assert their_numbers == numbers
            assert all(torch.equal(their_tensors[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", ["llama3", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_compiled_blocks_gather_and_scatter_too(name):
    plans = [TP2, ParallelConfig(1, 1, tp=2, compile=True, remat=Remat.selective)]
    for (numbers, tensors), (theirs, their_tensors) in run(recomputed, world_size=2, name=name, plans=plans):
        for want, got in zip(numbers, theirs, strict=True):
            assert got == pytest.approx(want, rel=1e-9)
        same(their_tensors, tensors)


def counted(name, plan):
    """Calls and bytes that a rank receives, of each collective of one forward and backward of one micro-batch."""
    torch.set_num_threads(1)
    case = Case(name, plan)
    found = {}

    def counting(call, label, size):
        def run_counted(*args, **kwargs):
            calls, numbers = found.get(label, (0, 0))
            found[label] = calls + 1, numbers + size(*args)
            return call(*args, **kwargs)

        return run_counted

    dist = torch.distributed
    dist.all_gather_single = counting(dist.all_gather_single, "gather", lambda out, x: out.numel() - x.numel())
    dist.reduce_scatter_single = counting(dist.reduce_scatter_single, "scatter", lambda out, x: x.numel() - out.numel())
    dist.all_reduce = counting(dist.all_reduce, "sum", lambda x: x.numel())
    case.engine.losses(rows(0, case.config.n_mtp), rows=torch.tensor(4.0), depths=case.config.n_mtp).sum().backward()
    return found, case.config


@pytest.mark.parametrize("name", ["deepseek_v3", "grok2", "olmo2"])
def test_ranks_send_what_the_documentation_says(name):
    for found, config in run(counted, world_size=2, name=name, plan=TP2):
        layers, passes = config.n_layers + config.n_mtp, 1 + config.n_mtp
        m = (2 - 1) / 2 * ROWS * LENGTH * config.d_model
        calls = 4 * layers + 2 * passes  # forward and backward: a layer 2 and 2, embedding and head 1
        assert found["gather"] == found["scatter"] == (calls, calls * m)
        chunks = -(-ROWS * LENGTH // SETTINGS.loss_chunk)
        norms = 4 * layers if name == "olmo2" else 0
        assert found["sum"] == (2 * chunks * passes + norms, ROWS * LENGTH * (3 * passes + norms))


def narrow(name, plan):
    torch.set_num_threads(1)
    case = Case(name, plan, precision=PrecisionConfig(Dtype.fp32, Dtype.bf16))
    return case.update(0)  # a second one would follow the signs of small gradients


@pytest.mark.parametrize("plan, ranks", [(TP2, 2), pytest.param(MIXED, 4, marks=pytest.mark.slow)])
def test_bf16_products_come_near_those_of_one_process(plan, ranks):
    want = narrow("llama3", SINGLE)
    for got in run(narrow, world_size=ranks, name="llama3", plan=plan):
        assert got == pytest.approx(want, rel=2e-2)  # partial sums are rounded to bf16 before they are added
