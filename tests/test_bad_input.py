"""What a user gets wrong on the command line: one line that names it, exit status 2, nothing written."""

import json
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from killing import wait_for

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
        (["parallel.remat=some"], ["parallel.remat", "some", "none, block, selective"]),
        (["parallel.reshard=sometimes"], ["parallel.reshard", "sometimes", "auto, always, never"]),
        (["parallel.compile=inductor"], ["parallel.compile", "inductor"]),
        (["parallel.offload=true"], ["parallel.offload=true", "must be false in a single process"]),
        (["model.blocks.dense.attention.n_kv_heads=3"], ["n_kv_heads=3", "divisor of n_heads"]),
        (["data.vocab_size=5000"], ["model.vocab_size=4096", "at least the tokenizer's 5000"]),
        (["data=shards"], ["data.folder"]),
        (["data=shards", "data.folder=nowhere"], ["nowhere"]),
        (["checkpoint.init=nowhere"], ["checkpoint.init=nowhere", "step-"]),
        (["checkpoint.resume=nowhere"], ["nowhere"]),
        (["train.steps"], ["train.steps"]),
        (["model=null"], ["model=null", "llama3_tiny"]),
        (["model.blocks.dense.mla.n_heads=3"], ["model.blocks.dense.mla.n_heads=3", "empty slot"]),
        (["run_dir="], ["run_dir"]),
        (["optim=sgd"], ["optim", "sgd", "adamw", "muon"]),
        (["optim.lr=0"], ["optim.lr=0.0: must be above 0, and finite"]),
        (["optim.lr=nan"], ["optim.lr=nan: must be above 0, and finite"]),
        (["optim.weight_decay=-1"], ["optim.weight_decay=-1.0: must be 0 or more"]),
        (["optim.beta2=1"], ["optim.beta2=1.0: must be from 0 up to, not including, 1"]),
        (["optim.kind=muon"], ["optim.muon=null: must be given where optim.kind=muon"]),
        (["optim.muon.momentum=0.9"], ["optim.muon.momentum=0.9", "empty slot"]),
        (["optim=muon", "optim.muon=null"], ["optim.muon=null: must be given where optim.kind=muon"]),
        (["optim=muon", "optim.kind=adamw"], ["optim.muon={…}: must be null where optim.kind=adamw"]),
        (["optim=muon", "optim.muon.momentum=1"], ["optim.muon.momentum=1.0: must be from 0 up to, not"]),
        (["optim=muon", "optim.muon.momentum=fast"], ["optim.muon.momentum", "fast"]),
        (["optim=muon", "optim.muon.nesterov=maybe"], ["optim.muon.nesterov", "maybe"]),
        (["optim=muon", "optim.muon.ns_steps=0"], ["optim.muon.ns_steps=0: must be 1 to 99"]),
        (["optim=muon", "optim.muon.coefficients=[1,2]"], ["optim.muon.coefficients=[1.0, 2.0]: must be three"]),
        (["optim=muon", "optim.muon.coefficients=[1,2,inf]"], ["optim.muon.coefficients", "finite"]),
        (["optim=muon", "optim.muon.update_rms=0"], ["optim.muon.update_rms=0.0: must be above 0"]),
        (["optim=muon", "optim.muon.steps=5"], ["optim.muon.steps", "unknown key", "ns_steps"]),
        (["schedule=cosin"], ["schedule", "cosin", "cosine", "wsd_sqrt"]),
        (["schedule.kind=step"], ["schedule.kind", "step", "piecewise"]),
        (["schedule.warmup=-1"], ["schedule.warmup=-1: must be 0 or more"]),
        (["schedule.floor=2"], ["schedule.floor=2.0: must be 0 to 1"]),
        (["schedule.clock=hours"], ["schedule.clock", "hours", "tokens"]),
        (["schedule=wsd", "schedule.decay_shape=steep"], ["schedule.decay_shape", "steep", "sqrt"]),
        (["schedule=wsd", "schedule.decay=-3"], ["schedule.decay=-3: must be 0 or more"]),
        (["schedule.kind=piecewise"], ["schedule.pieces=0: must be at least one piece where kind is piecewise"]),
        (["schedule.pieces=[{until: 2, value: 1}]"], ["schedule.pieces=1: must be [] where kind is cosine"]),
        (["schedule.mtp_weight=[{value: 1}]"], ["schedule.mtp_weight[0].until"]),
        (["schedule.mtp_weight=[{until: 1, worth: 1}]"], ["schedule.mtp_weight[…].worth: unknown key", "until, value"]),
        (["schedule.mtp_weight=[{until: 1, value: x}]"], ["schedule.mtp_weight[…].value", "'x'"]),
        (
            ["schedule.balance_rate=[{until: 9, value: 1}, {until: 3, value: 0}]"],
            ["schedule.balance_rate[1].until=3.0: must be above 9"],
        ),
        (["schedule.batch=[{until: 1, share: 0}]"], ["schedule.batch[0].share=0.0: must be above 0"]),
        (["schedule.batch=[{until: 1, share: 0.1}]"], ["schedule.batch[0].share=0.1: must be enough for one row"]),
        (["schedule.theta=[{start: 1, theta: -5}]"], ["schedule.theta[0].theta=-5.0: must be above 0"]),
        (["schedule.theta=[{start: 1, theta: 9, kinds: [x]}]"], ["schedule.theta[0].kinds=['x']: must be kinds"]),
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


def test_a_checkpoint_of_another_optimizer_is_refused(capsys, monkeypatch, tmp_path):
    command = [sys.executable, "train.py", *SMALL, "model.d_model=32", f"run_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    line = refused(capsys, monkeypatch, f"run_dir={tmp_path}/run", "model.d_model=32", "train.steps=4", "optim=muon")
    assert "momentum_buffer" in line and "step-00000002" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_under_torchrun_rank_0_alone_says_it(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *SMALL]
    done = subprocess.run([*command, "train.steps=0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("error: train.steps=0: must be above 0") == 1


def under_torchrun(*overrides):
    """The error lines of two processes of which one at least must fail; none may show a traceback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *SMALL]
    done = subprocess.run([*command, "parallel=fsdp", *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    before, _, launcher = done.stderr.partition("torch/distributed/elastic/multiprocessing/api.py")
    assert "Traceback" not in before and "[rank" not in done.stderr, done.stderr
    assert launcher.count("Traceback (most") == 1, done.stderr  # the launcher's own
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_under_torchrun_data_that_is_not_there_is_one_line(tmp_path):
    [line] = under_torchrun("data=shards", "data.folder=nowhere", f"run_dir={tmp_path}/run")
    assert "nowhere" in line


def test_under_torchrun_a_damaged_shard_is_one_line(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / "train-00000.bin").write_bytes(b"short")
    [line] = under_torchrun("data=shards", f"data.folder={tmp_path}/shards", f"run_dir={tmp_path}/run")
    assert "train-00000.bin" in line
    assert json.loads((tmp_path / "run" / "status.json").read_text())["outcome"] == "failed"


@pytest.mark.parametrize("name", ["run.yaml", "plots/loss.png"])
def test_under_torchrun_a_file_that_rank_0_cannot_write_is_one_line(tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    [line] = under_torchrun(f"run_dir={tmp_path}/run")
    assert f"{tmp_path}/run/{name}" in line
    assert json.loads((tmp_path / "run" / "status.json").read_text())["outcome"] == "failed"


def test_a_run_dir_that_is_a_file_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "run").write_text("")
    line = refused(capsys, monkeypatch, f"run_dir={tmp_path}/run")
    assert f"run_dir={tmp_path}/run: must be a folder to write to: File exists" in line


def test_a_damaged_line_of_metrics_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    line = refused(capsys, monkeypatch, f"run_dir={tmp_path}")
    assert f"{tmp_path}/metrics.jsonl, line 1" in line


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_run_whose_folder_is_taken_meanwhile(capsys, monkeypatch, tmp_path, number, code):
    command = [sys.executable, "train.py", *SMALL, "train.steps=1000000", f"run_dir={tmp_path}/run"]
    # A shell's background job ignores SIGINT and hands that on; a run at a terminal does not.
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
        line = refused(capsys, monkeypatch, f"run_dir={tmp_path}/run")
        assert f"run_dir={tmp_path}/run: another run is going on there" in line
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert said.count("stopped; the same command goes on from the last checkpoint") == (number == signal.SIGINT)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["outcome"] == "stopped"


def test_starting_over_keeps_the_metrics_of_before(tmp_path):
    command = [sys.executable, "train.py", *SMALL, f"run_dir={tmp_path}"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert subprocess.run([*command, "checkpoint.resume=never", "train.steps=1"], cwd=ROOT).returncode == 0
    assert (tmp_path / "checkpoints" / "replaced-1" / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1
