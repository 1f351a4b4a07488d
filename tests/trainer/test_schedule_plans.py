"""A run whose batches grow and whose rotary angles change, under several processes and against one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHANGING = [
    "model=deepseek_v3_tiny", "data=synthetic", "precision=fp64", "log.wandb=disabled", "train.steps=4",
    "train.seq_len=16", "train.global_batch=8", "train.micro_batch=1", "train.eval_every=0", "schedule.warmup=1",
    "schedule.batch=[{until: 1, share: 0.5}, {until: 3, share: 0.75}]", "schedule.theta=[{start: 2, theta: 5000}]",
    "schedule.mtp_weight=[{until: 2, value: 1}, {until: 4, value: 0.5, shape: linear}]", "checkpoint.every=2",
    "schedule.balance_rate=[{until: 3, value: 1}, {until: 4, value: 0}]", "checkpoint.keep=0",
]  # fmt: skip


def train(run_dir, *overrides, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*launcher, "train.py", *CHANGING, f"run_dir={run_dir}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(rows):
    return [[row[key] for key in ("step", "tokens", "loss", "mtp_loss", "grad_norm", "lr")] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("plan, processes", [("fsdp", 2), ("pp_fsdp", 4)])
def test_what_changes_on_the_way_does_not_depend_on_the_plan(tmp_path, plan, processes):
    alone = numbers(train(tmp_path / "alone"))
    assert [row[1] for row in alone] == [64, 160, 256, 384]
    spread = numbers(train(tmp_path / plan, f"parallel={plan}", processes=processes))
    assert spread == [pytest.approx(row, rel=1e-9) for row in alone]
    stored = f"checkpoint.resume={tmp_path / plan / 'checkpoints/step-00000002'}"
    assert numbers(train(tmp_path / "again", stored)) == [pytest.approx(row, rel=1e-9) for row in alone[2:]]
