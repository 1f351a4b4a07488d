"""What a user gets wrong on the command line: one line that names it, exit status 2, nothing written."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from data.config import PrepareConfig as Prepare
from data.prepare import prepare

ROOT = Path(__file__).parents[1]
SMALL = [
    "model=llama3_tiny", "data=synthetic", "train.steps=2", "train.seq_len=16", "train.global_batch=2",
    "train.micro_batch=1", "train.eval_every=0", "log.wandb=disabled",
]  # fmt: skip


def refused(capsys, monkeypatch, *overrides):
    """The one line of a run that must end with status 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *overrides])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1 and lines[-1] == said[0], lines
    return said[0]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.stepz=3"], ["train.stepz", "unknown key", "did you mean steps?"]),
        (["nothing=3"], ["nothing", "unknown key", "run_dir"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["train.steps=0"], ["train.steps=0: must be above 0"]),
        (["optim.kind=sgd"], ["optim.kind", "sgd", "adamw"]),
        (["model=llama9"], ["model", "llama9", "llama3_tiny"]),
        (["precision=fp4"], ["precision", "fp4", "bf16"]),
        (["train.global_batch=3", "train.micro_batch=2"], ["train.global_batch=3", "train.micro_batch (2)"]),
        (["train.seq_len=10000000"], ["train.seq_len=10000000", "model.context"]),
        (["parallel.dp_shard=2"], ["parallel.dp_shard=2", "number of processes (1)"]),
        (["model.blocks.dense.attention.n_kv_heads=3"], ["n_kv_heads=3", "divisor of n_heads"]),
        (["data.vocab_size=5000"], ["model.vocab_size=4096", "at least the tokenizer's 5000"]),
        (["data=shards"], ["data.folder"]),
        (["data=shards", "data.folder=nowhere"], ["nowhere"]),
        (["checkpoint.init=nowhere"], ["checkpoint.init=nowhere", "step-"]),
        (["checkpoint.resume=nowhere"], ["nowhere"]),
        (["train.steps"], ["train.steps"]),
    ],
)
def test_a_wrong_word_is_one_line(capsys, monkeypatch, tmp_path, overrides, words):
    line = refused(capsys, monkeypatch, f"run_dir={tmp_path}/run", *overrides)
    for word in words:
        assert word in line, line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of a text that repeats itself {i % 7} times\n" for i in range(4000)))
    prepare(Prepare(source=str(text), out=str(folder / "out"), vocab_size=400, validation=0.0))
    return folder / "out"


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupted", "manifest"])
def test_damaged_shards_are_named(capsys, monkeypatch, tmp_path, shards, damage):
    import shutil

    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    shard = folder / "train-00000.bin"
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(whole[:-7])
    elif damage == "corrupted":
        shard.write_bytes(bytes(255 - byte for byte in whole))
    else:
        (folder / "manifest.json").write_text("{")
    run = ["data=shards", f"data.folder={folder}", f"run_dir={tmp_path}/run"]
    line = refused(capsys, monkeypatch, *run)
    assert ("manifest.json" if damage == "manifest" else "train-00000") in line


def test_a_checkpoint_of_another_model_is_refused(capsys, monkeypatch, tmp_path):
    run = ["model.blocks.dense.mlp.d_ff=32", f"run_dir={tmp_path}/run"]
    done = subprocess.run([sys.executable, "train.py", *SMALL, *run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    line = refused(capsys, monkeypatch, f"run_dir={tmp_path}/run", "model.blocks.dense.mlp.d_ff=48", "train.steps=4")
    assert "d_ff" in line and "32" in line and "48" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_under_torchrun_rank_0_alone_says_it(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *SMALL]
    done = subprocess.run([*command, "train.steps=0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("error: train.steps=0: must be above 0") == 1
