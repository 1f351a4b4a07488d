"""Runs whose batches, rotary angles, MTP weight and balance rate change on the way, and their restarts."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from models import CONF

from conf import schema
from launch.world import World
from train import train
from trainer.stored import read_tensors

SMALL = [
    "data=synthetic", "precision=fp64", "train.steps=4", "train.seq_len=16", "train.global_batch=4",
    "train.micro_batch=1", "train.eval_every=0", "log.wandb=disabled", "schedule.warmup=1",
]  # fmt: skip
LLAMA = ["model=llama3_tiny", *SMALL]
THETA = "schedule.theta=[{start: 2, theta: 2000000}]"
HALVES = "schedule.batch=[{until: 2, share: 0.5}]"


def resolve(*words):
    GlobalHydra.instance().clear()
    schema.register()
    with initialize_config_dir(str(CONF), version_base=None):
        run = schema.resolve(compose("train", overrides=list(words)))
    return run, schema.check(run, world_size=1)


def lines(folder, *words):
    run, sizes = resolve(*words, f"run_dir={folder}")
    train(run, sizes=sizes, place=World(rank=0, size=1, local_rank=0))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(rows):
    return [row["loss"] for row in rows]


def test_a_run_with_a_ramp_counts_the_tokens_it_saw(tmp_path):
    assert [row["tokens"] for row in lines(tmp_path, *LLAMA, HALVES)] == [32, 64, 128, 192]


@pytest.mark.parametrize("word", [HALVES, THETA])
def test_a_restart_in_the_middle_changes_nothing(tmp_path, word):
    whole = losses(lines(tmp_path / "whole", *LLAMA, word, "checkpoint.every=3"))
    resume = f"checkpoint.resume={tmp_path / 'whole/checkpoints/step-00000003'}"
    again = lines(tmp_path / "again", *LLAMA, word, resume)
    assert losses(again) == whole[3:]


def test_a_run_is_not_continued_under_another_ramp(tmp_path):
    lines(tmp_path, *LLAMA, HALVES, "checkpoint.every=3")
    with pytest.raises(ValueError, match=r"schedule\.batch=\[\]: must be \[\[2, 2\]\]"):
        lines(tmp_path, *LLAMA, "train.steps=5")


def test_theta_changes_losses_from_its_update_on_and_is_stored(tmp_path):
    plain = losses(lines(tmp_path / "plain", *LLAMA))
    changed = losses(lines(tmp_path / "changed", *LLAMA, THETA))
    assert changed[:2] == plain[:2]
    assert all(a != b for a, b in zip(changed[2:], plain[2:], strict=True))
    stored = next((tmp_path / "changed/checkpoints").glob("step-*/*.json")).read_text()
    assert "2000000.0" in stored


@pytest.mark.parametrize(
    "words, said",
    [
        ([THETA, "model=gpt2_tiny"], r"schedule\.theta\[0\]\.theta=2000000\.0: no layer of the model has rotary"),
        (["schedule.theta=[{start: 2, theta: 9, kinds: [x]}]"], r"schedule\.theta\[0\]\.kinds=\['x'\]: must be kinds"),
        ([HALVES, "train.micro_batch=4"], r"schedule\.batch, 2 rows: .*multiple of train\.micro_batch \(4\)"),
        (["schedule.batch=[{until: 2, share: 0.1}]"], r"schedule\.batch\[0\]\.share=0\.1: must be enough for one row"),
        (["schedule.pieces=[{until: 2, value: 1}]"], r"schedule\.pieces=1: must be \[\] where kind is cosine"),
        (["schedule.mtp_weight=[{until: 2, value: -1}]"], r"schedule\.mtp_weight\[0\]\.value=-1\.0: must be 0 or more"),
        (["schedule.length=0"], r"schedule\.length=0\.0: must be above 0"),
        (["schedule.kind=inverse_sqrt", "schedule.warmup=0"], r"schedule\.warmup=0: must be 1 or more"),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_line(words, said):
    with pytest.raises(schema.ConfigError, match=said) as caught:
        resolve(*LLAMA, "run_dir=none", *words)
    assert "\n" not in str(caught.value)


def test_weights_of_mtp_and_balancing_fall(tmp_path):
    words = ["model=deepseek_v3_tiny", *SMALL, "checkpoint.every=1", "checkpoint.keep=0"]
    still = "schedule.balance_rate=[{until: 2, value: 1}, {until: 4, value: 0}]"
    unweighted = "schedule.mtp_weight=[{until: 2, value: 1}, {until: 4, value: 0}]"
    rows = lines(tmp_path / "still", *words, still, unweighted)
    plain = lines(tmp_path / "plain", *words)
    assert losses(rows)[:2] == losses(plain)[:2]
    assert losses(rows)[2] == losses(plain)[2]  # made before its own update
    assert losses(rows)[3] != losses(plain)[3]
    biases = [stored_biases(tmp_path / "still", step) for step in (1, 2, 3, 4)]
    assert not torch.equal(biases[0], biases[1])
    assert torch.equal(biases[1], biases[2]) and torch.equal(biases[2], biases[3])


def stored_biases(folder, step):
    stored = read_tensors(folder / f"checkpoints/step-{step:08}", under="model")
    return torch.cat([stored[name] for name in stored if name.endswith("balance_bias")])
