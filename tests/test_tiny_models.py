"""Every shipped ``_tiny`` model trains on the embedded corpus, through the front door."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from models import SHIPPED

ROOT = Path(__file__).parents[1]
TINY = [name for name in SHIPPED if name.endswith("_tiny")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tmp_path_factory.mktemp("shards") / "stdlib"


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_twenty_steps_lower_the_loss(tmp_path, shards, model):
    overrides = [
        f"model={model}", "data=stdlib", f"data.folder={shards}", f"run_dir={tmp_path}", "train.steps=20",
        "train.seq_len=128", "train.global_batch=8", "train.micro_batch=8", "train.eval_every=20", "train.eval_rows=8",
        "schedule.warmup=4", "log.wandb=disabled",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert mean(losses[-3:]) < mean(losses[:3]) - 0.5, losses
