"""A run under the name of an unpublished model says which open one it trains; one without dimensions cannot start."""

import runpy
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from conf import schema

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.n_layers=1", "model.d_model=32", "model.vocab_size=300", "model.blocks.dense.mlp.d_ff=16", "data=synthetic",
    "train.steps=1", "train.seq_len=8", "train.global_batch=1", "train.micro_batch=1", "train.eval_every=0",
    "checkpoint.every=0", "log.wandb=disabled",
]  # fmt: skip


def start(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    GlobalHydra.instance().clear()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@pytest.mark.parametrize("name", ["gpt4o_standin", "chameleon_7b"])
def test_a_stand_in_says_so_and_no_other_model_does(capsys, monkeypatch, tmp_path, name):
    start(monkeypatch, f"model={name}", f"run_dir={tmp_path}/run", *SMALL)
    said = capsys.readouterr().err
    note = f"model={name}: the architecture of GPT-4o is unpublished, this is Chameleon 7B; chameleon "
    assert said.startswith(note) == (name == "gpt4o_standin"), said
    assert ("unpublished" in said) == (name == "gpt4o_standin")


def test_a_model_without_dimensions_is_refused_in_one_line(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, "model=chameleon_34b", *SMALL)
    assert ended.value.code == 2
    line = "model=chameleon_34b: its dimensions are unpublished; python -m zoo chameleon_34b says what is known"
    assert capsys.readouterr().err == f"error: {line}\n"
    with pytest.raises(schema.ConfigError, match="unpublished"):
        schema.check_words(["train.steps=3", "model=chameleon_34b"])
