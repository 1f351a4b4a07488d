"""A killed ``train.py`` resumes bitwise: weights, AdamW state, router bias and metrics, in one and in two processes."""

import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import run
from killing import Group, Kill, Operations, check_whole, outcome, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

ROOT = Path(__file__).parents[1]
STEPS = 12
OVERRIDES = [
    "model=deepseek_v3_tiny",
    "model.d_model=32",
    "model.n_layers=2",
    "model.vocab_size=256",
    "data=synthetic",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.seq_len=32",
    "train.eval_every=5",
    "train.eval_rows=2",
    "train.sample_tokens=0",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "log.wandb=disabled",
    "log.experts=1",
]


def start(run_dir: Path, *, ranks: int, kill: Kill | None) -> Group:
    """``train.py`` in forked processes, which spares them the imports; file operations count within checkpoints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        Operations(run_dir / "checkpoints", rank=rank, kill=kill)
        if ranks > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({key: str(value) for key, value in world.items()}, MASTER_PORT=str(port))
        os.chdir(ROOT)
        sys.argv = ["train.py", *OVERRIDES, f"run_dir={run_dir}", "parallel=fsdp"]
        runpy.run_path("train.py", run_name="__main__")

    return Group(work, ranks=ranks, log=run_dir.with_suffix(".log"))


def kill_at_a_line(group: Group, *, metrics: Path, draw: random.Random) -> str:
    """Kill a group that has just started, one or two lines of metrics and up to 50 ms after its first sign of life."""

    def changed() -> int:
        return metrics.stat().st_mtime_ns if metrics.exists() else 0

    def lines() -> int:
        return metrics.read_bytes().count(b"\n")

    before = changed()
    wait_for(lambda: changed() > before)
    target = lines() + draw.randint(1, 2)
    wait_for(lambda: lines() >= target)
    time.sleep(draw.random() * 0.05)
    group.kill()
    return f"after line {target}"


def kill_five_times(*, folder: Path, ranks: int) -> list[str]:
    """A run with and a run without kills end alike; where the kills fell."""
    import matplotlib.pyplot  # noqa: F401  # here once, instead of in every process

    import train  # noqa: F401

    reference, killed = folder / "reference", folder / "killed"
    assert start(reference, ranks=ranks, kill=None).wait() == [0] * ranks, reference.with_suffix(".log").read_text()
    expected = outcome(reference)
    assert [row["step"] for row in expected.rows] == list(range(1, STEPS + 1))
    assert expected.loads.count(b"\n") == STEPS
    for part in ("balance_bias", "exp_avg_sq", "head.weight"):
        assert any(part in name for name in expected.tensors), part

    draw = random.Random(ranks)
    moments = []
    for i in range(5):
        if i % 2 == 0:
            rank = draw.randrange(ranks)
            kill = Kill(rank, at=draw.randrange(4 if rank else 20))  # in the first or second save
            group = start(killed, ranks=ranks, kill=kill)
            moments.append(str(kill))
        else:
            group = start(killed, ranks=ranks, kill=None)
            moments.append(kill_at_a_line(group, metrics=killed / "metrics.jsonl", draw=draw))
        assert group.wait() == [-signal.SIGKILL] * ranks, f"{moments}\n{group.log.read_text()}"
        check_whole(killed)
    assert start(killed, ranks=ranks, kill=None).wait() == [0] * ranks, killed.with_suffix(".log").read_text()
    assert outcome(killed) == expected, f"{moments}"
    return moments


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_five_times_ends_as_if_it_had_not_been(tmp_path, ranks):
    [moments] = run(kill_five_times, world_size=1, group=False, timeout=400, folder=tmp_path, ranks=ranks)
    print(moments)


def launch(run_dir: Path, *, ranks: int) -> subprocess.Popen[bytes]:
    """``python train.py`` or ``torchrun``, as a user would."""
    launcher = (
        ["train.py"]
        if ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "train.py"]
    )
    command = [sys.executable, *launcher, *OVERRIDES, f"run_dir={run_dir}", "parallel=fsdp"]
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launcher and its workers, which torchrun puts into sessions of their own."""
    process.send_signal(signal.SIGSTOP)  # it starts no more
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    family = {process.pid}
    while new := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= new
    for pid in family - {process.pid}:
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_any_time_ends_as_if_it_had_not_been(tmp_path, ranks):
    begin = time.monotonic()
    reference = tmp_path / "reference"
    assert launch(reference, ranks=ranks).wait() == 0, reference.with_suffix(".log").read_text()
    duration = time.monotonic() - begin
    expected = outcome(reference)
    draw = random.Random(ranks)
    for i in range(5):
        killed = tmp_path / f"killed{i}"
        process = launch(killed, ranks=ranks)
        if i < 3:
            time.sleep(draw.uniform(0.2, 0.95) * duration)
        else:
            folder = killed / "checkpoints" / f".step-{draw.randrange(2, STEPS, 2):08d}.tmp"
            wait_for(folder.exists)
        kill_all(process)
        check_whole(killed)
        assert launch(killed, ranks=ranks).wait() == 0, killed.with_suffix(".log").read_text()
        assert outcome(killed) == expected, f"{i=}"
