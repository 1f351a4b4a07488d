"""Whole runs that skip updates, report spikes, resume, end when numbers are lost, and leave a trace."""

import gzip
import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from models import CONF

from conf import schema
from launch.world import World
from parallel import reduce
from train import train
from trainer.engine import TorchEngine
from trainer.guard import Diverged
from trainer.stored import read_tensors

TINY = [
    "model=deepseek_v3_tiny", "data=synthetic", "data.vocab_size=64", "precision=fp64", "train.seq_len=16",
    "train.global_batch=2", "train.micro_batch=2", "train.eval_every=0", "log.wandb=disabled", "schedule.warmup=1",
    "model.vocab_size=64", "model.d_model=32", "model.n_layers=2",
]  # fmt: skip
OFTEN = ["train.outliers={sigma: 0.2, window: 4}", "train.skip=true"]
TIMES = ("seconds", "tokens_per_second")


def resolve(*words):
    GlobalHydra.instance().clear()
    schema.register()
    with initialize_config_dir(str(CONF), version_base=None):
        run = schema.resolve(compose("train", overrides=[*TINY, *words]))
    return run, schema.check(run, world_size=1)


def rows(folder, *words):
    run, sizes = resolve(f"run_dir={folder}", *words)
    train(run, sizes=sizes, place=World(rank=0, size=1, local_rank=0))
    return lines(folder / "metrics.jsonl")


def lines(file):
    read = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read]


def stored(folder, step):
    tensors = read_tensors(folder / f"checkpoints/step-{step:08}")
    return {name: tensors[name] for name in tensors}


def test_a_skipped_update_leaves_everything_as_it_was_and_a_restart_is_bitwise(tmp_path):
    whole = tmp_path / "whole"
    steps = [*OFTEN, "train.steps=12", "checkpoint.every=1", "checkpoint.keep=0"]
    want = rows(whole, *steps)
    skipped = [row["step"] for row in want if row["skipped"]]
    assert 2 <= len(skipped) <= 9 and all(row["skipped"] in (0.0, 1.0) for row in want)
    for step in range(2, 13):
        before, after = stored(whole, step - 1), stored(whole, step)
        same = {name: torch.equal(before[name], after[name]) for name in after}
        assert (
            all(same.values())
            if step in skipped
            else not any(equal for name, equal in same.items() if name.endswith(("wq.weight", "step", "balance_bias")))
        ), step
    assert [each["step"] for each in lines(whole / "spikes.jsonl") if each["skipped"]] == skipped

    middle = next(step for step in range(5, 12) if step + 1 in skipped or step in skipped)
    again = tmp_path / "again"
    resume = f"checkpoint.resume={whole}/checkpoints/step-{middle:08}"
    assert rows(again, *steps, resume) == want[middle:]
    assert lines(again / "spikes.jsonl") == lines(whole / "spikes.jsonl")[sum(step <= middle for step in told(whole)) :]
    ours, theirs = stored(again, 12), stored(whole, 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def told(folder):
    return [each["step"] for each in lines(folder / "spikes.jsonl")]


def spoiling(monkeypatch, *, at, by, parameter):
    """Multiply the gradient of a parameter in one update."""
    forward_backward, made = TorchEngine.forward_backward, []

    def spoilt(engine, batches, counts):
        terms = forward_backward(engine, batches, counts)
        made.append(1)
        if len(made) in at:
            reduce.local(dict(engine.model.named_parameters())[parameter].grad).mul_(by)
        return terms

    monkeypatch.setattr(TorchEngine, "forward_backward", spoilt)


def test_a_gradient_that_is_no_number_ends_a_run_and_is_named(tmp_path, monkeypatch):
    spoiling(monkeypatch, at=[3], by=float("nan"), parameter="blocks.1.mixer.wo.weight")
    with pytest.raises(Diverged, match="step 3: grad_norm is nan; no checkpoint was made of it"):
        rows(tmp_path, "train.steps=4")
    assert lines(tmp_path / "spikes.jsonl")[0]["not_finite"] == ["blocks.1.mixer.wo.weight"]
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_where_updates_are_skipped_it_is_one_of_them(tmp_path, monkeypatch):
    spoiling(monkeypatch, at=[3, 4], by=float("nan"), parameter="blocks.1.mixer.wo.weight")
    got = rows(tmp_path, "train.steps=6", "train.skip=true")
    assert [row["skipped"] for row in got] == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert all(x.isfinite().all() for x in stored(tmp_path, 6).values())


def test_a_trace_of_some_updates_is_left(tmp_path, capfd):
    rows(tmp_path, "train.steps=4", "log.profile=[2,3]")
    assert f"updates 2 to 3 are traced in {tmp_path}/profile" in capfd.readouterr().err
    with gzip.open(tmp_path / "profile/rank0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names and any("Optimizer.step" in str(name) for name in names)


@pytest.mark.parametrize(
    "word, said",
    [
        ("log.profile=[3]", r"log\.profile=\[3\]: must be null, or \[first, last\] update, from 1"),
        ("log.profile=[3,2]", r"log\.profile=\[3, 2\]: must be null"),
        ("log.profile=[0,2]", r"log\.profile=\[0, 2\]: must be null"),
        ("log.profile=[2,9]", r"log\.profile=\[2, 9\]: must end by train\.steps \(4\)"),
        ("log.detail_every=0", r"log\.detail_every=0: must be 1 or more"),
        ("train.outliers.sigma=0", r"train\.outliers\.sigma=0\.0: must be above 0"),
        ("train.outliers.window=3", r"train\.outliers\.window=3: must be 4 or more"),
        ("train.z_loss=-1", r"train\.z_loss=-1\.0: must be 0 or more"),
    ],
)
def test_what_makes_no_sense_is_one_line(word, said):
    with pytest.raises(schema.ConfigError, match=said) as caught:
        resolve("run_dir=none", "train.steps=4", word)
    assert "\n" not in str(caught.value)
