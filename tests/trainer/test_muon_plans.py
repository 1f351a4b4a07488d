"""Muon under every plan: five updates in float64 against one process; bitwise in bf16; what travels; checkpoints."""

import functools
from collections import Counter

import pytest
import torch
from distributed import run
from saving import alone as saved_alone
from saving import grouped
from sharing import ALONE, FAMILIES, MUON, Case, merged, same

from parallel import reduce
from parallel.config import Dtype, ParallelConfig, PipelineConfig, PrecisionConfig, ScheduleName
from parallel.layout import stored_name
from parallel.owners import boxes
from planner.wire import Wire
from trainer import groups
from trainer.muon import Muon
from zoo.decoder import Decoder

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
NAMES = ("llama3", "deepseek_v3", "qwen3_next", "gpt_oss", "gemma3")
DENSE = {"llama3", "gemma3"}
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
    for plan, names in FAST.items():
        yield plan, names
    for plan, (config, _) in PLANS.items():
        names = [name for name in NAMES if name not in FAST.get(plan, []) and not (config.ep > 1 and name in DENSE)]
        yield pytest.param(plan, names, marks=pytest.mark.slow)


@pytest.mark.parametrize("plan, names", list(marked()), ids=str)
def test_five_updates_are_those_of_one_process(plan, names):
    config, ranks = PLANS[plan]
    results = run(train, world_size=ranks, timeout=1500, names=names, plan=config)
    for name in names:
        want, tensors = alone(name)
        ours = [result[name] for result in results]
        for numbers, _ in ours:
            for got, exact in zip(numbers, want, strict=True):
                assert got == pytest.approx(exact, rel=1e-9, abs=1e-15)
        print(f"| {plan} | {name} | {same(merged(each for _, each in ours), tensors):.0e} |")


def narrow(plan, name):
    """Parameters after an update in fp32 with the same gradients everywhere; what the update sends; owned matrices."""
    torch.set_num_threads(1)
    case = Case(name, plan, precision=PrecisionConfig(Dtype.fp32, Dtype.fp32), optim_config=MUON)
    case.update(0)  # opens what ranks talk over
    for moments in case.engine.optimizer.state.values():
        for moment in moments.values():
            reduce.local(moment).zero_()
    named = dict(case.model.named_parameters())
    for key, parameter in named.items():
        parameter.grad = torch.zeros_like(parameter)
        generator = torch.Generator().manual_seed(len(stored_name(key)))
        for x in (parameter, parameter.grad):
            view = reduce.view(case.model, key, x)
            whole = torch.randn(view.shape, generator=generator)
            part = reduce.part(view) if isinstance(view, torch.distributed.tensor.DTensor) else ...
            reduce.local(x).data.copy_(whole[part])
    wire = Wire(case.mesh)
    with wire:
        case.engine.optimizer.step()
    sent = {(line.axis, line.operation): (line.calls, line.sent) for line in wire.lines.values()}
    views = reduce.views(case.model, {key: parameter.detach() for key, parameter in named.items()})
    (muon,) = [part for part in case.engine.optimizer.parts if isinstance(part, Muon)]
    stage = case.mesh.lane("stage")
    tensors = {stored_name(key): reduce.whole(x).clone() for key, x in views.items()}
    return tensors, sent, _pieces(muon, 0 if stage is None else stage.rank)


def _pieces(muon, rank):
    """Rounds; bytes in bf16 of a rank's pieces of what others own and of others' pieces of its own; what it owns."""
    sent, owned = 0, Counter()
    for each in muon.rounds:
        for task in each.tasks:
            if task.owner != rank:
                sent += task.senders[rank].numel if rank in task.senders else 0
            else:
                owned[task.matrix.size] += 1
                sent += sum(piece.numel for holder, piece in task.holders.items() if holder != rank)
    return len(muon.rounds), 2 * sent, owned


@functools.cache
def narrow_alone(name):
    return narrow(ALONE, name)


BITWISE = ["hsdp 2 x 2", "tp 2 x fsdp 2", "ep 2 x fsdp 4", "ep 2 x tp 2", "ep 4 over tp 2", "cp 2", "pp 2 zbv x fsdp 2"]


@pytest.mark.parametrize("plan", ["fsdp 2", "tp 2", *(pytest.param(plan, marks=pytest.mark.slow) for plan in BITWISE)])
def test_the_same_gradients_give_bitwise_the_same_weights_in_bf16_and_one_exchange_each_way(plan):
    config, ranks = PLANS[plan]
    want, sent, (_, _, all_owned) = narrow_alone("deepseek_v3")
    assert not sent
    results = run(narrow, world_size=ranks, plan=config, name="deepseek_v3")
    for got, sent, (rounds, numbers, _) in results:
        assert all(torch.equal(x, want[name]) for name, x in got.items())
        assert rounds == 1 and list(sent.values()) == [(2, numbers)]
        assert {operation for _, operation in sent} == {"all-to-all"}
    assert {name for got, _, _ in results for name in got} == want.keys()
    # Matrices of one size lie in stacks of other heights than on one process, and of several heights.
    owned = [owned for _, _, (_, _, owned) in results]
    assert sum(owned, Counter()) == all_owned
    assert any(len({each[size] for each in owned}) > 1 for size in all_owned)


@pytest.mark.parametrize(
    "plan, name, copies, shares",
    [
        ("fsdp 2", "llama3", 1, 2),
        pytest.param("tp 2", "llama3", 1, 2, marks=pytest.mark.slow),
        pytest.param("hsdp 2 x 2", "llama3", 2, 2, marks=pytest.mark.slow),
        pytest.param("tp 2 x fsdp 2", "llama3", 1, 4, marks=pytest.mark.slow),
        pytest.param("hsdp 2 x tp 2", "llama3", 2, 2, marks=pytest.mark.slow),
        pytest.param("ep 2", "qwen3_moe", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_together_send_the_bytes_that_are_documented(plan, name, copies, shares):
    """docs/parallel.md, of matrices that the ranks share evenly; experts that a rank has whole stay there."""
    config, ranks = PLANS[plan]
    model = FAMILIES[name]()
    with torch.device("meta"):
        shapes = {key: p.shape for key, p in Decoder(model).named_parameters()}
    numbers = sum(
        shape.numel()
        for key, shape in shapes.items()
        if groups.role(key, config=model) is groups.Role.matrix and not (config.ep > 1 and ".experts." in key)
    )
    there = (shares - 1) * numbers * 2 // shares
    back = there + (copies - 1) * numbers * 2
    results = run(narrow, world_size=ranks, plan=config, name=name)
    assert sum(bytes for _, sent, _ in results for _, bytes in sent.values()) == there + back


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
    (2, ["fsdp 2", "alone", "tp 2"]),
    pytest.param(4, ["tp 2 x fsdp 2", "ep 2 x tp 2", "pp 2 zbv x fsdp 2", "hsdp 2 x 2"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("ranks, names", MOVES)
def test_a_checkpoint_of_any_plan_goes_on_under_any_other(ranks, names, tmp_path):
    want = part_of_a_run(ALONE, tmp_path / "alone", steps=1 + len(names))
    part_of_a_run(ALONE, tmp_path / "moved", steps=1)
    for name in names:
        if name == "alone":
            part_of_a_run(ALONE, tmp_path / "moved", steps=1)
            continue
        given = {"plan": PLANS[name][0], "folder": tmp_path / "moved", "steps": 1}
        results = run(part_of_a_run, world_size=ranks, **given)
    same(merged(results), want)
