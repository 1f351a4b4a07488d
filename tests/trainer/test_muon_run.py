"""Whole runs of ``train.py optim=muon``: one process and two, restarts, checkpoints from plan to plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.stored import read_tensors

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "tokens_per_second")
SMALL = [
    "optim=muon", "data=synthetic", "log.wandb=disabled", "train.steps=4", "train.seq_len=24",
    "train.global_batch=8", "train.micro_batch=2", "train.eval_every=2", "train.eval_rows=4", "checkpoint.every=2",
    "schedule.warmup=2",
]  # fmt: skip
MODEL = [
    "model=deepseek_v3_tiny", "model.d_model=48", "model.vocab_size=300",
    "model.blocks.moe.moe.router.balance_rate=0.01",
]  # fmt: skip
LEAN = ["parallel=fsdp", "parallel.reshard=never", "parallel.offload=true", "parallel.remat=selective"]

pytestmark = pytest.mark.slow


def train(run_dir, *overrides, processes=1):
    """Run to the end and read the metrics."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*launcher, "train.py", *MODEL, *SMALL, f"run_dir={run_dir}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def forget(run_dir, aside, *, step=4):
    """Make the checkpoint of an earlier update the latest."""
    (run_dir / "checkpoints" / f"step-{step:08d}").rename(aside)


def tensors(run_dir, step=4):
    stored = read_tensors(run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: stored[name] for name in stored}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """In float64: a run, and what it stored."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return train(run_dir, "precision=fp64"), tensors(run_dir)


def near(got, want):
    for theirs, ours in zip(got, want, strict=True):
        for key in ours:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-9), key


@pytest.mark.parametrize("plan", [LEAN, ["parallel=single", "parallel.dp_shard=1", "parallel.tp=2"]], ids=str)
def test_two_processes_have_the_losses_of_one(tmp_path, alone, plan):
    near(train(tmp_path / "run", "precision=fp64", *plan, processes=2), alone[0])


@pytest.mark.parametrize("plan, processes", [([], 1), (LEAN, 2)])
def test_a_run_that_starts_again_is_bitwise_one_that_did_not(tmp_path, plan, processes):
    words = ["precision=fp32", *plan]
    whole, part = tmp_path / "whole", tmp_path / "part"
    want = train(whole, *words, processes=processes)
    train(part, *words, processes=processes)
    forget(part, tmp_path / "later")
    assert train(part, *words, processes=processes) == want
    ours, theirs = tensors(whole), tensors(part)
    assert ours.keys() == theirs.keys() and any("momentum_buffer" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_goes_from_fsdp_to_one_process_to_tp(tmp_path, alone):
    want, stored = alone
    words, run = ["precision=fp64", "checkpoint.every=1", "checkpoint.keep=0"], tmp_path / "run"
    train(run, *words, "parallel=fsdp", processes=2)
    for step in (2, 3, 4):
        forget(run, tmp_path / f"fsdp-{step}", step=step)
    train(run, *words)
    for step in (3, 4):
        forget(run, tmp_path / f"alone-{step}", step=step)
    near(train(run, *words, "parallel=single", "parallel.dp_shard=1", "parallel.tp=2", processes=2), want)
    got = tensors(run)
    assert got.keys() == stored.keys()
    for name, x in stored.items():
        assert (got[name] - x).abs().max() <= 1e-9 * x.abs().max() + 1e-15, name
