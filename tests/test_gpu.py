"""Runs on a CUDA device, against the same runs on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    "data=synthetic", "log.wandb=disabled", "train.steps=4", "train.seq_len=64", "train.global_batch=8",
    "train.micro_batch=4", "train.eval_every=4", "train.eval_rows=5",
]  # fmt: skip


def losses(run_dir, *overrides, visible):
    environment = os.environ if visible else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", *SMALL, f"run_dir={run_dir}", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows] + [rows[-1]["val_loss"]]


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama3_tiny", "qwen3_tiny", "deepseek_v3_tiny"])
@pytest.mark.parametrize("precision, error", [("fp64", 1e-8), ("fp32", 1e-3), ("bf16", 2e-2)])
def test_losses_on_a_gpu_are_those_on_a_cpu(tmp_path, model, precision, error):
    run = [f"model={model}", f"precision={precision}"]
    on_gpu = losses(tmp_path / "gpu", *run, visible=True)
    assert on_gpu == pytest.approx(losses(tmp_path / "cpu", *run, visible=False), rel=error)
