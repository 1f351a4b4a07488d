"""Muon under every plan: five updates in float64 against one process; bitwise in bf16; what travels; checkpoints."""

import functools

import pytest
import torch
from distributed import run
from saving import alone as saved_alone
from saving import grouped
from sharing import ALONE, MUON, Case, merged, same

from parallel import reduce
from parallel.config import Dtype, ParallelConfig, PipelineConfig, PrecisionConfig, ScheduleName
from parallel.owners import boxes
from planner.wire import Wire
from trainer.muon import Muon

UPDATES = 5
PLANS = {
    "fsdp 2": (ParallelConfig(1, 2), 2),
    "tp 2": (ParallelConfig(1, 1, tp=2), 2),
    "hsdp 2 x 2": (ParallelConfig(2, 2), 4),
    "hsdp 2 x 1": (ParallelConfig(2, 1), 2),
    "tp 4": (ParallelConfig(1, 1, tp=4), 4),
    "tp 2 x fsdp 2": (ParallelConfig(1, 2, tp=2), 4),
    "hsdp 2 x tp 2": (ParallelConfig(2, 1, tp=2), 4),
    "ep 2": (ParallelConfig(1, 2, ep=2), 2),
    "ep 2 x fsdp 4": (ParallelConfig(1, 4, ep=2), 4),
    "ep 2 x tp 2": (ParallelConfig(1, 2, ep=2, tp=2), 4),
    "ep 4 over tp 2": (ParallelConfig(1, 2, ep=4, tp=2, expert_tp=False), 4),
    "cp 2": (ParallelConfig(1, 1, cp=2), 2),
    "pp 2 1f1b": (ParallelConfig(1, 1, pp=2), 2),
    "pp 2 zbv x fsdp 2": (ParallelConfig(1, 2, pp=2, pipeline=PipelineConfig(ScheduleName.zbv)), 4),
}
NAMES = ("llama3", "deepseek_v3", "qwen3_next", "gpt_oss")
FAST = {"fsdp 2": ["deepseek_v3"], "tp 2": ["deepseek_v3"]}


def train(names, plan):
    """Of each family: losses, norms and loads of five updates, and what was updated."""
    torch.set_num_threads(1)
    results = {}
    for name in names:
        case = Case(name, plan, optim_config=MUON)
        numbers = [case.update(step) for step in range(UPDATES)]
        results[name] = numbers, case.tensors()
    return results


@functools.cache
def alone(name):
    return train([name], ALONE)[name]


def marked():
    for plan, (config, _) in PLANS.items():
        for name in NAMES:
            if config.ep > 1 and name == "llama3":
                continue
            slow = name not in FAST.get(plan, [])
            yield pytest.param(plan, name, marks=pytest.mark.slow) if slow else (plan, name)


@pytest.mark.parametrize("plan, name", list(marked()))
def test_five_updates_are_those_of_one_process(plan, name):
    config, ranks = PLANS[plan]
    want, tensors = alone(name)
    results = [result[name] for result in run(train, world_size=ranks, timeout=300, names=[name], plan=config)]
    for numbers, _ in results:
        for got, exact in zip(numbers, want, strict=True):
            assert got == pytest.approx(exact, rel=1e-9, abs=1e-15)
    print(f"| {plan} | {name} | {same(merged(each for _, each in results), tensors):.0e} |")


def narrow(plan):
    """Parameters after two updates in fp32 with the same gradients everywhere, and what a step sends, by operation."""
    torch.set_num_threads(1)
    case = Case("deepseek_v3", plan, precision=PrecisionConfig(Dtype.fp32, Dtype.fp32), optim_config=MUON)
    case.update(0)  # opens what ranks talk over
    for moments in case.engine.optimizer.state.values():
        for moment in moments.values():
            reduce.local(moment).zero_()
    named = dict(case.model.named_parameters())
    for name, parameter in named.items():
        generator = torch.Generator().manual_seed(len(name))
        for x, drawn in ((parameter, torch.randn), (_grad(parameter), torch.randn)):
            view = reduce.view(case.model, name, x)
            whole = drawn(view.shape, generator=generator)
            part = reduce.part(view) if isinstance(view, torch.distributed.tensor.DTensor) else ...
            reduce.local(x).data.copy_(whole[part])
    wire = Wire(case.mesh)
    with wire:
        case.engine.optimizer.step()
    sent = {(line.axis, line.operation): (line.calls, line.sent) for line in wire.lines.values()}
    views = reduce.views(case.model, {name: parameter.detach() for name, parameter in named.items()})
    (muon,) = [part for part in case.engine.optimizer.parts if isinstance(part, Muon)]
    return {name: reduce.whole(x).clone() for name, x in views.items()}, sent, _expected(muon, case.mesh.rank)


def _grad(parameter):
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _expected(muon, rank):
    """Bytes in bf16 that leave a rank: its pieces of what others own, and of what it owns the others'."""
    sent = 0
    for each in muon.rounds:
        for task in each.tasks:
            if task.owner != rank:
                sent += task.senders[rank].numel if rank in task.senders else 0
            else:
                sent += sum(piece.numel for holder, piece in task.holders.items() if holder != rank)
    return len(muon.rounds), 2 * sent


@pytest.mark.parametrize("plan", ["fsdp 2", "tp 2", pytest.param("ep 2 x tp 2", marks=pytest.mark.slow)])
def test_the_same_gradients_give_bitwise_the_same_weights_in_bf16_and_one_exchange_each_way(plan):
    config, ranks = PLANS[plan]
    want, sent, _ = narrow(ALONE)
    assert not sent
    for got, sent, (rounds, numbers) in run(narrow, world_size=ranks, plan=config):
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert {operation for _, operation in sent} == {"all-to-all"}
        assert list(sent.values()) == [(2 * rounds, numbers)]


def placed(plan, name):
    """Whether boxes are where torch says, and the momentum lies as its parameter."""
    case = Case(name, plan, optim_config=MUON)
    wrong = []
    place = torch.distributed.get_rank(case.mesh.group("stage"))
    for key, view in reduce.views(case.model, dict(case.model.named_parameters())).items():
        found = boxes(view.shape, axes=view.device_mesh.shape, placements=view.placements)[place]
        there = tuple((each.start, each.stop) for each in reduce.part(view))
        if any(a != b for a, b in zip(found, there, strict=True)) and reduce.local(view).numel():
            wrong.append((key, found, there))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp 2 x fsdp 2", "ep 2 x fsdp 4", "ep 2 x tp 2", "ep 4 over tp 2", "hsdp 2 x 2"])
def test_pieces_lie_where_torch_puts_them(plan):
    config, ranks = PLANS[plan]
    assert run(placed, world_size=ranks, plan=config, name="deepseek_v3") == [[]] * ranks


def part_of_a_run(plan, folder, steps):
    """Go on from a folder's latest checkpoint for some updates, save, and give the whole state."""
    torch.set_num_threads(1)
    case = Case("deepseek_v3", plan, optim_config=MUON)
    checkpoints = (grouped if torch.distributed.is_initialized() else saved_alone)(folder)
    progress = checkpoints.restore(case.engine.state())
    case.engine.filled()
    first = 0 if progress is None else progress["step"]
    for step in range(first, first + steps):
        case.update(step)
    checkpoints.save(first + steps, case.engine.state(), progress={"step": first + steps})
    return case.tensors()


MOVES = [
    (2, ["fsdp 2", "tp 2"]),
    pytest.param(4, ["tp 2 x fsdp 2", "ep 2 x tp 2", "pp 2 zbv x fsdp 2", "hsdp 2 x 2"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("ranks, names", MOVES)
def test_a_checkpoint_of_any_plan_goes_on_under_any_other(ranks, names, tmp_path):
    want = part_of_a_run(ALONE, tmp_path / "alone", steps=1 + len(names))
    part_of_a_run(ALONE, tmp_path / "moved", steps=1)
    for name in names:
        given = {"plan": PLANS[name][0], "folder": tmp_path / "moved", "steps": 1}
        results = run(part_of_a_run, world_size=ranks, **given)
    same(merged(results), want)
