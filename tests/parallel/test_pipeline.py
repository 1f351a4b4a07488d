"""Updates of small models in float64 that are cut into pipeline stages, against one process."""

import weakref

import pytest
import torch
from distributed import run
from piping import SCHEDULES, Case, alone, merged, piped, plan_of
from sharing import LENGTH, same
from sharing import ROWS as SHARED_ROWS
from sharing import Case as Spread

from parallel.config import ParallelConfig, Remat, Reshard
from parallel.layout import stored_name
from parallel.stage import Stage

STEPS = 3


def check(family, *, world_size, dp=1, steps=STEPS, **settings):
    """Compare all that a pipeline finds with one process."""
    losses, first, counted, values, logits = alone(family, steps)
    results = run(piped, world_size=world_size, family=family, steps=steps, dp=dp, timeout=300, **settings)
    got = sum(result[0] for result in results)  # zeros but where the last stage is
    torch.testing.assert_close(got, losses, rtol=1e-9, atol=0)
    far = [same(merged(result[1] for result in results), first), same(merged(result[3] for result in results), values)]
    found = {}
    for result in results:
        for name, x in result[2].items():
            found[name] = found.get(name, 0) + x
    assert found.keys() == counted.keys() and (not counted or same(found, counted) < 1e-9)
    for result in results:
        same(dict(enumerate(result[4])), dict(enumerate(logits)))
    stored = [name for result in results for name in result[5]["stored"]]
    assert len(stored) == dp * len({*stored}) and values.keys() <= {*stored}, "each is stored once"
    print(f"{family} {settings}: {far[0]:.1e} {far[1]:.1e}")
    return results


FAST = [("llama3", "1f1b"), ("deepseek_v3", "zbv"), ("deepseek_v3", "interleaved"), ("gemma3", "dualpipev")]


@pytest.mark.parametrize(
    "family, schedule",
    [
        pytest.param(family, schedule, marks=[] if (family, schedule) in FAST else pytest.mark.slow)
        for family in ("llama3", "deepseek_v3", "gemma3", "qwen3_next", "gpt_oss", "gpt2")
        for schedule in SCHEDULES
    ],
)
def test_two_ranks_update_as_one_process_does(family, schedule):
    check(family, world_size=2, schedule=schedule, pp=2)


@pytest.mark.parametrize(
    "family, schedule",
    [("gemma3", "zbv"), *(pytest.param("gemma3", each, marks=pytest.mark.slow) for each in SCHEDULES if each != "zbv")],
)
def test_four_ranks_update_as_one_process_does(family, schedule):
    check(family, world_size=4, schedule=schedule, pp=4, n=8)


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_fewer_micro_batches_than_ranks_or_stages_will_do(schedule):
    check("gemma3", world_size=2, schedule=schedule, pp=2, n=1, steps=1)


SHARDED = [
    ("deepseek_v3", "dualpipev", 2, None),
    ("gemma3", "zbv", 1, None),
    ("gemma3", "1f1b", 2, Reshard.always),
    ("deepseek_v3", "interleaved", 2, Reshard.never),
    ("llama3", "zbv", 2, Reshard.always),
    ("llama3", "interleaved", 1, Reshard.always),
    ("deepseek_v3", "1f1b", 2, None),
]


@pytest.mark.parametrize(
    "family, schedule, runs, reshard",
    [*SHARDED[:1], *(pytest.param(*each, marks=pytest.mark.slow) for each in SHARDED[1:])],
)
def test_stages_that_fsdp_shards_sum_gradients_once_an_update(family, schedule, runs, reshard):
    check(family, world_size=4, schedule=schedule, pp=2, dp=2, runs=runs, n=2, reshard=reshard)


@pytest.mark.parametrize("remat", [Remat.block, Remat.selective])
@pytest.mark.parametrize("schedule", ["zbv", pytest.param("1f1b", marks=pytest.mark.slow)])
def test_blocks_may_run_again_in_the_backward(schedule, remat):
    check("deepseek_v3", world_size=2, schedule=schedule, pp=2, remat=remat)


def many(family, steps, **settings):
    """Values after many updates, and whether a copy that was spoiled is made good."""
    case = Case(family, **settings)
    for step in range(steps):
        case.update(step)
    values = case.values()
    named = dict(case.model.named_parameters())
    for name in case.model.copies:
        with torch.no_grad():
            named[name].zero_()
    case.model.match_copies(named)
    return values, case.values()


@pytest.mark.parametrize(
    "family, schedule, dp", [("gemma3", "1f1b", 1), ("deepseek_v3", "zbv", 1), ("deepseek_v3", "interleaved", 2)]
)
def test_copies_are_bitwise_equal_after_twenty_updates_and_can_be_made_so(family, schedule, dp):
    results = run(many, world_size=2 * dp, family=family, steps=20, schedule=schedule, pp=2, dp=dp, n=2, timeout=300)
    for results_now in ([result[0] for result in results], [result[1] for result in results]):
        names = [name for values in results_now for name in values]
        assert sum(stored_name(name) == "embed.weight" for name in names) == 2 * dp
        merged(results_now)  # fails where two differ in a bit
    for before, after in results:
        assert all(torch.equal(before[name], after[name]) for name in before)


def reductions(schedule, runs):
    """How many groups of parameters FSDP has, and how often it sums gradients over ranks in one update."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    case, found = Case("deepseek_v3", schedule, pp=2, dp=2, n=2, runs=runs), []
    reduce = groups.foreach_reduce
    groups.foreach_reduce = lambda *args, **kwargs: found.append(1) or reduce(*args, **kwargs)
    case.update(0)
    modules = [*case.model.layers(), *case.model.depths(), *case.model.parts()]
    return len([module for module in modules if any(True for _ in own(module))]), len(found)


def own(module):
    """Parameters of an FSDP module that are in none inside of it."""
    inner = {id(p) for child in module.modules() if child is not module and fsdp(child) for p in child.parameters()}
    return (p for p in module.parameters() if id(p) not in inner)


def fsdp(module):
    return isinstance(module, torch.distributed.fsdp.FSDPModule)


@pytest.mark.parametrize("schedule, runs", [("1f1b", 1), ("zbv", 2)])
def test_gradients_are_summed_over_ranks_once_an_update(schedule, runs):
    for groups, calls in run(reductions, world_size=4, schedule=schedule, runs=runs):
        assert calls == groups


def narrow(schedule):
    """Gradients of sharded stages that compute in bf16."""
    case = Case("llama3", schedule, pp=2, dp=2, n=8, compute=torch.bfloat16, params=torch.float32)
    return case.update(0)[1]


def test_gradients_in_bf16_add_up_in_fp32_whether_or_not_the_backward_is_taken_apart():
    want = merged(run(narrow, world_size=4, schedule="interleaved"))
    got = merged(run(narrow, world_size=4, schedule="zbv"))
    for name, x in want.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6 * x.abs().max().item())


def held(schedule, n):
    """The most buffers for received states or gradients that exist at one time, and how many are left in the end."""
    case, most = Case("llama3", schedule, pp=2, n=n), 0

    def real():
        stages = [stage for _, stages in case.model._schedules.values() for stage in stages]
        of = [
            infos
            for stage in stages
            for each in (stage.args_recv_info, stage.grad_recv_info)
            for infos in each.values()
        ]
        return sum(info.buffer is not None and not info.buffer.is_meta for infos in of for info in infos)

    def counting(call):
        def counted(*args, **kwargs):
            nonlocal most
            most = max(most, real())
            return call(*args, **kwargs)

        return counted

    for name in ("forward_one_chunk", "backward_one_chunk"):
        setattr(Stage, name, counting(getattr(Stage, name)))
    case.update(0)
    return most, real()


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zbv", marks=pytest.mark.slow)])
def test_buffers_exist_only_while_they_are_in_use(schedule):
    for most, left in run(held, world_size=2, schedule=schedule, n=16):
        assert 0 < most <= 3 and left == 0  # torch's own would be 16 and more


def alive(schedule, n):
    """The most that is alive at one time of what a rank has sent and of its last stage's inputs."""
    case, sends, inputs, most = Case("llama3", schedule, pp=2, n=n), [], [], [0, 0]

    def noting(call, into, tensors):
        def noted(self, *args, **kwargs):
            result = call(self, *args, **kwargs)
            into.extend(weakref.ref(x.untyped_storage()) for x in tensors(self, args, result))
            for i, references in enumerate((sends, inputs)):
                most[i] = max(most[i], sum(each() is not None for each in references))
            return result

        return noted

    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        setattr(Stage, name, noting(getattr(Stage, name), sends, lambda _, args, ops: [op.tensor for op in ops]))
    run_stage = Stage.forward_maybe_with_nosync
    Stage.forward_maybe_with_nosync = noting(
        run_stage, inputs, lambda stage, args, _: args[:1] if stage.is_last else []
    )
    case.update(0)
    assert not case.model._schedules.popitem()[1][0].sends._held
    return len(sends), len(inputs), *most


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_states_live_no_longer_than_their_backward_and_their_receipt(schedule):
    few, many = (run(alive, world_size=2, schedule=schedule, n=n) for n in (8, 16))
    for (sends, inputs, *most), (twice, twice_inputs, *still) in zip(few, many, strict=True):
        assert twice == 2 * sends > 0 and twice_inputs == 2 * inputs
        assert still == most and max(most) <= 7
    assert any(inputs for _, inputs, *_ in many)


def sent(family, schedule):
    """Numbers of all states and gradients that a rank sends in one run, and what tensor parallelism sends besides."""
    torch.set_num_threads(1)
    plan = ParallelConfig(1, 1, tp=2, pp=2, pipeline=plan_of(schedule))
    case, found = Spread(family, plan), {"pp": 0, "gather": 0, "scatter": 0}

    def counting(call, label, size):
        def counted(*args, **kwargs):
            result = call(*args, **kwargs)
            found[label] += size(result, *args)
            return result

        return counted

    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        of = getattr(Stage, name)
        setattr(Stage, name, counting(of, "pp", lambda ops, *_: sum(op.tensor.numel() for op in ops)))
    dist = torch.distributed
    dist.all_gather_single = counting(dist.all_gather_single, "gather", lambda _, out, x: out.numel() - x.numel())
    dist.reduce_scatter_single = counting(
        dist.reduce_scatter_single, "scatter", lambda _, out, x: x.numel() - out.numel()
    )
    case.update(0)
    return found, case.config


@pytest.mark.parametrize(
    "family, schedule",
    [
        pytest.param(family, schedule, marks=[] if (family, schedule) == ("deepseek_v3", "zbv") else pytest.mark.slow)
        for family in ("llama3", "deepseek_v3")
        for schedule in SCHEDULES
    ],
)
def test_ranks_send_states_and_gradients_once_and_no_layer_communicates_twice(family, schedule):
    results = run(sent, world_size=4, family=family, schedule=schedule)
    config = results[0][1]
    passes, layers = 1 + config.n_mtp, config.n_layers + config.n_mtp
    stages = 2 if schedule == "1f1b" else 4
    crossings = {"1f1b": 1, "interleaved": 3, "zbv": 2, "dualpipev": 2}[schedule]  # between neighbours on two ranks
    tokens = SHARED_ROWS * LENGTH * config.d_model // 2  # each rank's, of all micro-batches
    total = {label: sum(found[label] for found, _ in results) for label in results[0][0]}
    assert total["pp"] == 2 * (2 * crossings * tokens), stages  # both ranks of tp, forward and backward
    calls = 4 * layers + 2 * passes  # forward and backward: a layer 2 and 2, embedding and head 1 (docs/parallel.md)
    assert total["gather"] == total["scatter"] == 2 * calls * tokens
