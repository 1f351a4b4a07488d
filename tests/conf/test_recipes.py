"""Published recipes: what they compose to, how long their runs are, and their twins for a CPU."""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from conf import schema
from launch.world import World
from planner import dryrun
from train import train
from trainer.config import Moments, OptimKind
from trainer.config_groups import Role
from trainer.config_timeline import steps_to
from trainer.schedule import Schedule
from zoo.count import parameters


@dataclass
class Published:
    """What a recipe has to come to.

    Attributes:
        processes: of its plan.
        tokens: of the whole run.
        batch: tokens of a batch, once it has grown.
        decay: weight decay.
        phases: by position in tokens, the learning rate there.
        no_decay: what does not decay.
        billions: of parameters, without MTP modules.
    """

    processes: int
    tokens: float
    batch: float
    phases: dict[float, float]
    billions: float
    no_decay: tuple[Role, ...] | None = None
    kind: OptimKind = OptimKind.adamw
    moments: Moments = Moments.full


EMBEDDING = (Role.embedding,)
RECIPES = {
    "llama3_8b": Published(256, 15e12, 4.2e6, {0.05e12: 3e-4, 15e12: 3e-6}, 8.0),
    "llama3_405b": Published(
        16384, 15.6e12, 16.8e6, {0.1e12: 8e-5, 15.6e12: 8e-7}, 405.9
    ),
    "deepseek_v3": Published(
        2048, 14.8e12, 62.9e6, {5e12: 2.2e-4, 12.15e12: 1.21e-4, 14.5e12: 2.2e-5, 14.7e12: 7.3e-6},
        671.0, moments=Moments.bf16,
    ),
    "olmo2_7b": Published(128, 3.9e12, 4.2e6, {0.1e12: 3e-4, 3.9e12: 6.08e-5}, 7.3, EMBEDDING),
    "olmo2_13b": Published(512, 5e12, 8.4e6, {0.1e12: 9e-4, 5e12: 9e-5}, 13.7, EMBEDDING),
    "olmo2_32b": Published(1024, 6.5e12, 8.4e6, {0.1e12: 6e-4, 6.5e12: 6e-5}, 32.2, EMBEDDING),
    "smollm3": Published(
        384, 11.14e12, 2.36e6, {9.9e12: 2e-4, 10.52e12: 1e-4, 11.136e12: 0.0}, 3.1, EMBEDDING
    ),
    "kimi_k2": Published(
        2048, 15.96e12, 67.1e6, {9.9e12: 2e-4, 12.75e12: 1.1e-4, 15.5e12: 2e-5, 15.96e12: 7e-6},
        1026.4, kind=OptimKind.muonclip,
    ),
    "glm45": Published(
        1024, 23e12, 67.1e6, {0.3e12: 2.5e-4, 23e12: 2.5e-5}, 352.8,
        kind=OptimKind.muon,
    ),
}  # fmt: skip
BALANCED = {"deepseek_v3": 14.3e12, "glm45": 15e12}
"""Until when routers' biases move."""
MTP = {"deepseek_v3": 10e12, "glm45": 15e12}
"""After which the MTP weight is 0.1."""
TWINS = [f"{name}_tiny" for name in RECIPES]


@cache
def resolved(*words):
    GlobalHydra.instance().clear()
    schema.register()
    with initialize_config_dir(str(schema.FOLDER), version_base=None):
        return schema.resolve(compose("train", overrides=list(words)))


def recipe(name):
    return resolved(f"experiment={name}")


def scheduled(run):
    return Schedule.of(run.schedule, train=run.train)


def tokens(run, step):
    """That the first ``step`` updates read."""
    return scheduled(run).timeline.before(step) * run.train.seq_len


def step_at(run, position):
    """The update that ends at so many tokens, or nearest to it."""
    low, high = 0, run.train.steps
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if tokens(run, middle + 1) < position else (low, middle)
    return min(low, run.train.steps - 1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_plan_and_reads_as_many_tokens_as_published(name):
    run, want = recipe(name), RECIPES[name]
    schema.check(run, world_size=want.processes)
    assert tokens(run, run.train.steps) == pytest.approx(want.tokens, rel=1e-3)
    assert run.train.steps == steps_to(run.schedule, global_batch=run.train.global_batch, seq_len=run.train.seq_len)
    assert run.train.global_batch * run.train.seq_len == pytest.approx(want.batch, rel=5e-3)
    assert run.train.seq_len == run.model.context, "rows are as long as in pretraining"
    assert run.precision.compute == "bf16"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_learning_rates_at_their_tokens(name):
    run, want = recipe(name), RECIPES[name]
    schedule = scheduled(run)
    got = {at: run.optim.lr * schedule.at(step_at(run, at)).lr for at in want.phases}
    assert got == pytest.approx(want.phases, rel=0.01, abs=1e-9)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_optimizer_and_model(name):
    run, want = recipe(name), RECIPES[name]
    assert parameters(run.model).total / 1e9 == pytest.approx(want.billions, abs=0.06)
    o = run.optim
    assert (o.kind, o.moments, o.weight_decay, o.beta1, o.beta2) == (want.kind, want.moments, 0.1, 0.9, 0.95)
    if want.kind is OptimKind.muonclip:
        assert o.qk_clip is not None and o.qk_clip.tau == 100
    if want.kind.is_muon:
        assert o.muon is not None and (o.muon.momentum, o.muon.ns_steps, o.muon.update_rms) == (0.95, 5, 0.2)
    assert o.no_decay == (None if want.no_decay is None else list(want.no_decay))


@pytest.mark.parametrize("name", BALANCED)
def test_balancing_ends_and_the_mtp_weight_falls_where_published(name):
    run = recipe(name)
    schedule = scheduled(run)
    for at, rate in ((0.99 * BALANCED[name], 1.0), (1.01 * BALANCED[name], 0.0), (run.schedule.length, 0.0)):
        assert schedule.at(step_at(run, at)).balance_rate == rate
    for at, weight in ((0.99 * MTP[name], 0.3), (1.01 * MTP[name], 0.1)):
        assert run.train.mtp_weight * schedule.at(step_at(run, at)).mtp_weight == pytest.approx(weight)
    routers = [block.moe.router for block in run.model.blocks.values() if block.moe is not None]
    assert [(router.balance_rate, router.balance_loss) for router in routers] == [(0.001, 0.0001)]


def test_olmo_2_has_its_z_loss_and_the_32b_skips_outliers():
    for name in RECIPES:
        settings = recipe(name).train
        assert settings.z_loss == (1e-5 if name.startswith("olmo2") else 0)
        assert settings.skip == (name == "olmo2_32b")


def test_batches_grow_as_published():
    llama, deepseek = recipe("llama3_405b"), recipe("deepseek_v3")
    stages = schema.ramp(llama)
    assert [n * 8192 / 2**22 for _, n in stages] == [1, 2]  # 4M tokens, 8M
    assert tokens(llama, stages[0][0]) == pytest.approx(252e6, rel=0.01)
    assert tokens(llama, sum(n for n, _ in stages)) == pytest.approx(2.87e12, rel=1e-3)
    assert [n for _, n in schema.ramp(deepseek)][0] == 3072 and deepseek.train.global_batch == 15360
    assert tokens(deepseek, sum(n for n, _ in schema.ramp(deepseek))) == pytest.approx(469e9, rel=1e-3)


def test_positions_are_those_of_pretraining():
    for name, theta in (("smollm3", 50_000), ("glm45", 10_000), ("llama3_405b", 500_000), ("olmo2_7b", 500_000)):
        ropes = [b.attention.rope for b in recipe(name).model.blocks.values() if b.attention.rope is not None]
        assert ropes and all(rope.theta == theta and rope.scaling is None for rope in ropes), name
    for name in ("deepseek_v3", "kimi_k2"):  # at 4,096 YaRN does nothing
        scaling = recipe(name).model.blocks["moe"].mla.rope.scaling
        assert recipe(name).model.context <= scaling.original_context


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_differs_from_its_recipe_in_sizes_alone(name):
    whole, twin = recipe(name), recipe(f"{name}_tiny")
    for processes in (1, 2):
        schema.check(twin, world_size=processes)
    sizes = {"steps", "global_batch", "micro_batch", "seq_len", "eval_every", "eval_rows"}
    for part, ours in (("train", sizes), ("optim", {"lr"}), ("schedule", {"warmup", "decay"})):
        kept = [{k: v for k, v in asdict(getattr(run, part)).items() if k not in ours} for run in (whole, twin)]
        assert kept[0] == kept[1]
    assert twin.model.family == whole.model.family and twin.model.n_mtp == whole.model.n_mtp
    assert twin.data.kind == "stdlib" and twin.parallel == resolved("parallel=fsdp", "run_dir=x").parallel
    assert tokens(twin, twin.train.steps) < 1.5e6, "minutes on a CPU"
    shares = [run.schedule.decay / run.train.steps for run in (whole, twin)]
    assert shares[0] == pytest.approx(shares[1], abs=1 / twin.train.steps)
    assert len({recipe(each).run_dir for each in (*RECIPES, *TWINS)}) == 2 * len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_goes_through_the_phases_of_its_recipe(name):
    whole, twin = recipe(name), recipe(f"{name}_tiny")
    far, near = scheduled(whole), scheduled(twin)
    for share in (0.3, 0.5, 0.7, 0.8, 0.95, 0.98, 1.0):
        a, b = (
            far.at(step_at(whole, share * tokens(whole, whole.train.steps))),
            near.at(step_at(twin, share * tokens(twin, twin.train.steps))),
        )
        assert b.lr == pytest.approx(a.lr, abs=0.1)
        assert (b.mtp_weight, b.balance_rate) == (a.mtp_weight, a.balance_rate)


SMALL = [
    "train.steps=20", "train.seq_len=128", "schedule.warmup=4", "train.eval_every=0", "log.wandb=disabled",
    "checkpoint.every=0", "seed=3",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_learns(name, tmp_path):
    words = [f"experiment={name}", *SMALL, f"run_dir={tmp_path}"]
    if recipe(name).schedule.decay:
        words.append("schedule.decay=2")
    run = resolved(*words)
    train(run, sizes=schema.check(run, world_size=1), place=World(rank=0, size=1, local_rank=0))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    print(f"{name}: {losses[0]:.2f} to {losses[-1]:.2f}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm3", "deepseek_v3"])
def test_a_recipe_is_traced_at_its_size(name):
    run, want = recipe(name), RECIPES[name]
    rows = 5120 if name == "deepseek_v3" else run.train.global_batch  # a third: enough for every stage to be busy
    sizes = replace(run.train, global_batch=rows)
    report = dryrun.run(
        model=run.model,
        train=sizes,
        optim_config=run.optim,
        plan=run.parallel,
        precision=run.precision,
        hardware=run.hardware,
        world_size=want.processes,
    )
    memory = report.memory
    per_parameter = memory.optimizer / memory.parameters * 4
    assert per_parameter == pytest.approx(4 if want.moments is Moments.bf16 else 8, rel=1e-3)
    report.check()
