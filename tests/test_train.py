"""The front door: whole runs of ``train.py``, compared with each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.metrics import read_loads
from trainer.stored import read_tensors

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "tokens_per_second")
SMALL = [
    "model=deepseek_v3_tiny", "data=synthetic", "precision=fp64", "log.wandb=disabled", "train.steps=4",
    "train.seq_len=24", "train.global_batch=8", "train.micro_batch=1", "train.eval_every=2", "train.eval_rows=5",
    "checkpoint.every=2", "schedule.warmup=2", "model.blocks.moe.moe.router.balance_rate=0.01",
    "model.blocks.moe.moe.router.balance_loss=0.01", "model.blocks.moe.moe.router.z_loss=0.01",
    "model.blocks.moe.moe.router.switch_loss.weight=0.01",
    "model.blocks.moe.moe.router.switch_loss.scope=global_batch", "log.experts=2",
]  # fmt: skip


def train(run_dir, *overrides, processes=1):
    """Run to the end and read the metrics."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*launcher, "train.py", *SMALL, f"run_dir={run_dir}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensors(run_dir, step):
    stored = read_tensors(run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: stored[name] for name in stored}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_dir, train(run_dir)


LEAN = ["parallel.remat=selective", "parallel.reshard=never", "parallel.offload=true"]


@pytest.mark.parametrize("plan, processes, more", [("fsdp", 2, LEAN), ("hsdp", 4, [])])
def test_every_plan_has_the_losses_of_one_process(tmp_path, alone, plan, processes, more):
    _, want = alone
    got = train(tmp_path / "run", f"parallel={plan}", *more, processes=processes)
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for theirs, ours in zip(got, want, strict=True):
        for key in ours.keys() - set(TIMES):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-9), key


def test_a_run_has_its_files_and_keys(alone):
    run_dir, rows = alone
    for name in (
        "run.yaml",
        "status.json",
        "plots/loss.png",
        "plots/experts.png",
        "checkpoints/step-00000002",
        "checkpoints/step-00000004",
    ):
        assert (run_dir / name).exists(), name
    assert json.loads((run_dir / "status.json").read_text())["outcome"] == "finished"
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [192, 384, 576, 768]
    of_layers = {"expert_load_max", "expert_entropy", "dead_experts"}
    keys = {"loss", "grad_norm", "lr", "mtp_loss", "balance_loss", "router_z_loss", *of_layers, *TIMES}
    assert all(keys <= row.keys() for row in rows)
    layers = ["blocks.1", "blocks.2", "blocks.3", "mtp.0"]
    for row in rows:
        each = {f"{key}/{layer}" for key in of_layers for layer in layers}
        assert row.keys() & each == (each if row["step"] % 2 == 0 else set())
    loads = dict(read_loads(run_dir / "experts.jsonl"))
    assert [*loads] == [2, 4] and all([*of] == layers for of in loads.values())
    assert {sum(each) for of in loads.values() for each in of.values()} == {8 * 24 * 4}  # tokens, four experts each
    assert rows[1]["expert_load_max/mtp.0"] == max(loads[2]["mtp.0"]) * 16 / (8 * 24 * 4)
    assert ["val_loss" in row for row in rows] == [False, True, False, True]


def test_a_stopped_run_goes_on_bitwise_and_another_plan_goes_on_with_the_same_data(tmp_path, alone):
    run_dir, want = alone
    part = tmp_path / "part"
    # The schedule is that of four updates; the checkpoint of the second is where the second start goes on.
    train(part)
    (part / "checkpoints" / "step-00000004").rename(tmp_path / "later")
    again = train(part)
    strip = lambda rows: [{k: v for k, v in row.items() if k not in TIMES} for row in rows]  # noqa: E731
    assert strip(again) == strip(want)
    assert (part / "experts.jsonl").read_bytes() == (run_dir / "experts.jsonl").read_bytes()
    ours, theirs = tensors(run_dir, 4), tensors(part, 4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    (part / "checkpoints" / "step-00000004").rename(tmp_path / "later-still")
    resharded = train(part, "parallel=fsdp", processes=2)
    for theirs_row, ours_row in zip(resharded, want, strict=True):
        assert theirs_row["loss"] == pytest.approx(ours_row["loss"], rel=1e-9)


def test_weights_start_a_fresh_run_from_a_checkpoint_and_from_its_export(tmp_path, alone):
    run_dir, _ = alone
    checkpoint, exported = run_dir / "checkpoints" / "step-00000004", tmp_path / "hf"
    command = [sys.executable, "-m", "trainer.hf", "export", str(checkpoint), str(exported)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quiet = ["train.steps=1", "train.eval_every=0"]
    first = train(tmp_path / "first", *quiet, f"checkpoint.init={checkpoint}")
    second = train(tmp_path / "second", *quiet, f"checkpoint.init={exported}")
    fresh = train(tmp_path / "fresh", *quiet)
    assert first[0]["step"] == 1 and first[0]["tokens"] == 192
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-12)
    assert first[0]["loss"] < fresh[0]["loss"] - 0.01

    (exported / "tokenizer.json").write_text("carried")
    imported = tmp_path / "imported" / "step-00000000"
    command = [sys.executable, "-m", "trainer.hf", "import", str(exported), str(imported)]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    third = train(tmp_path / "third", *quiet, f"checkpoint.init={imported}")
    assert third[0]["loss"] == first[0]["loss"]
    command = [sys.executable, "-m", "trainer.hf", "export", str(imported), str(tmp_path / "again")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "carried"


def test_the_exported_folder_gives_the_same_logits_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    from zoo import hf

    train(tmp_path / "run", "precision=fp32", "train.eval_every=0", "train.steps=2")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    command = [sys.executable, "-m", "trainer.hf", "export", str(checkpoint), str(tmp_path / "hf")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = hf.load(tmp_path / "hf").eval()
    tokens = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
