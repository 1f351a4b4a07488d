"""Runs of ``train.py`` under plans of several processes, against one; checkpoints move between all of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.stored import read_tensors

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "tokens_per_second")
SMALL = [
    "model=deepseek_v3_tiny", "data=synthetic", "precision=fp64", "log.wandb=disabled", "train.steps=3",
    "train.seq_len=24", "train.global_batch=8", "train.micro_batch=2", "train.eval_every=1", "train.eval_rows=5",
    "checkpoint.every=1", "checkpoint.keep=0", "schedule.warmup=2", "model.blocks.moe.moe.router.balance_rate=0.01",
    "model.blocks.moe.moe.router.balance_loss=0.01",
]  # fmt: skip


def start(run_dir, *overrides, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*launcher, "train.py", *SMALL, f"run_dir={run_dir}", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def train(run_dir, *overrides, processes=1):
    """Run to the end and read the metrics."""
    done = start(run_dir, *overrides, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensors(run_dir, step):
    stored = read_tensors(run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: stored[name] for name in stored}


def same_numbers(got, want):
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for theirs, ours in zip(got, want, strict=True):
        for key in ours.keys() - set(TIMES):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-9), key


def same_tensors(got, want):
    assert got.keys() == want.keys()
    largest = max(tensor.abs().max() for tensor in want.values())
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype, name
        assert (got[name] - tensor).abs().max() <= 1e-9 * tensor.abs().max() + 1e-12 * largest, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_dir, train(run_dir)


PLANS = {
    "tp_fsdp": 4,
    "pp_fsdp": 4,
    "ep_fsdp": 2,
    "cp_fsdp": 2,
    "five_axes": 8,
    "hsdp": 4,
    "pp_fsdp parallel.pipeline.schedule=zbv": 2,
    "five_axes parallel.pipeline.schedule=dualpipev parallel.context=ulysses": 8,
    "five_axes parallel.ep=4 parallel.expert_tp=false parallel.context=ring parallel.remat=block": 8,
}


CASES = [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] != "five_axes")) for case in PLANS.items()]


@pytest.mark.parametrize("plan, processes", CASES)
def test_a_plan_has_the_losses_and_the_checkpoints_of_one_process(tmp_path, alone, plan, processes):
    run_dir, want = alone
    same_numbers(train(tmp_path / "run", *f"parallel={plan}".split(), processes=processes), want)
    same_tensors(tensors(tmp_path / "run", 3), tensors(run_dir, 3))


def drop(run_dir, *steps):
    """Take checkpoints away, so that the next start goes on from the one before."""
    for step in steps:
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")


def test_a_run_changes_plan_at_every_checkpoint(tmp_path, alone):
    alone_dir, want = alone
    run_dir = tmp_path / "run"
    train(run_dir, "parallel=tp_fsdp", processes=2)
    drop(run_dir, 2, 3)
    train(run_dir, "parallel=pp_fsdp", "parallel.ep=2", processes=4)
    drop(run_dir, 3)
    same_numbers(train(run_dir), want)
    same_tensors(tensors(run_dir, 3), tensors(alone_dir, 3))


@pytest.mark.slow
@pytest.mark.parametrize("plan, processes", [("five_axes", 8), ("pp_fsdp", 2)])
def test_a_run_under_one_plan_goes_on_under_another(tmp_path, alone, plan, processes):
    alone_dir, want = alone
    run_dir = tmp_path / "run"
    train(run_dir)
    drop(run_dir, 2, 3)
    same_numbers(train(run_dir, f"parallel={plan}", "parallel.pipeline.schedule=zbv", processes=processes), want)
    same_tensors(tensors(run_dir, 3), tensors(alone_dir, 3))


@pytest.mark.slow
@pytest.mark.parametrize("plan, processes", [("tp_fsdp", 2), ("five_axes", 8)])
def test_a_killed_run_goes_on_bitwise(tmp_path, plan, processes):
    whole = train(tmp_path / "whole", f"parallel={plan}", processes=processes)
    run_dir = tmp_path / "part"
    train(run_dir, f"parallel={plan}", processes=processes)
    drop(run_dir, 2, 3)
    strip = lambda rows: [{k: v for k, v in row.items() if k not in TIMES} for row in rows]  # noqa: E731
    assert strip(train(run_dir, f"parallel={plan}", processes=processes)) == strip(whole)
    ours, theirs = tensors(tmp_path / "whole", 3), tensors(run_dir, 3)
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_what_ranks_cannot_share_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # it is said before any other process is needed
    done = start(tmp_path / "run", "parallel=tp_fsdp", "model.blocks.moe.moe.d_expert=63")
    assert done.returncode == 2
    assert "parallel.tp=2: must divide model.blocks.moe.moe.d_expert (63)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
