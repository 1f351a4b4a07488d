"""A killed run ends as the run that was not killed, wherever the kill falls.

A small training loop over ``Checkpoints`` is killed before each of its file operations in turn, and with each file half
written; then it is started again. What counts as a file operation is what Python's audit hooks see, and fsync.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trainer import manifest
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
from trainer.durable import cut
from trainer.stored import read_tensors

STEPS = 3
TIMINGS = ("seconds", "tokens_per_second", "mfu")
LIMIT = 60  # seconds after which a process of a hanging group ends by itself


@dataclass(frozen=True)
class Kill:
    """SIGKILL of the whole process group when ``rank`` is about to do its file operation ``at``, counted from 0.

    With ``torn`` the operation is an fsync or a line of metrics, and only half of the content arrives.
    """

    rank: int
    at: int
    torn: bool


class Operations:
    """Counts and names the file operations of this process, and kills at the chosen one."""

    def __init__(self, folder: Path, *, rank: int, kill: Kill | None):
        self.folder = folder
        self.names: list[str] = []
        self.kill = kill if kill is not None and kill.rank == rank else None
        self.fsync = os.fsync
        os.fsync = self.synced
        sys.addaudithook(self.heard)

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        """Python's audit hook, called before the operation."""
        if event == "open" and isinstance(args[0], str | Path) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.reached("open", str(args[0]))
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            self.reached(event.removeprefix("os."), str(args[0]), relative=args[-1] != -1)

    def synced(self, handle: int) -> None:
        """In place of fsync."""
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isfile(path):
            self.reached("fsync", path, tear=lambda: os.truncate(path, os.path.getsize(path) // 2))
        else:
            self.reached("fsync", path)
        self.fsync(handle)

    def reached(self, kind: str, path: str, *, relative: bool = False, tear: Any = None) -> None:
        """One operation is about to happen."""
        if not relative and not path.startswith(str(self.folder)):
            return
        if self.kill is not None and self.kill.at == len(self.names):
            if self.kill.torn:
                tear()
            os.killpg(os.getpgrp(), signal.SIGKILL)
            time.sleep(LIMIT)
        self.names.append(f"{kind} {Path(path).name}{' torn' * (tear is not None)}")


def train(folder: Path, *, rank: int, world_size: int, operations: Operations) -> None:
    """AdamW on a weight of which each rank holds its rows, a router bias that all hold, and metrics."""
    torch.manual_seed(rank)
    weight = torch.nn.Parameter(torch.randn(8 // world_size, 6))
    bias = torch.zeros(4)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    moments = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    optimizer.state[weight] = moments
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None

    def spread(rows: Tensor) -> Tensor:
        return rows.detach() if mesh is None else DTensor.from_local(rows.detach(), mesh, [Shard(0)])

    state = {
        "model": {"weight": spread(weight), "balance_bias": bias},
        "optimizer": {name: spread(leaf) if leaf.ndim else leaf for name, leaf in moments.items()},
    }
    config = CheckpointConfig(every=2, keep=1, resume="auto", init=None)
    checkpoints = Checkpoints(folder / "checkpoints", config=config, rank=rank, world_size=world_size, about={"w": 1})
    progress = checkpoints.restore(state)
    step = 0 if progress is None else progress["step"]
    if rank == 0:
        cut(folder / "metrics.jsonl", step=step)
    while step < STEPS:
        torch.manual_seed(1000 + step)
        loss = (torch.randn(5, 6) @ weight.T - bias.mean()).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
        bias += 0.001 * torch.sign(total - torch.arange(4))
        step += 1
        if rank == 0:
            write_metrics(folder / "metrics.jsonl", {"step": step, "loss": total.item()}, operations=operations)
        if step % config.every == 0 or step == STEPS:
            checkpoints.save(step, state, progress={"step": step})


def write_metrics(file: Path, row: dict[str, Any], *, operations: Operations) -> None:
    line = json.dumps({**row, "seconds": time.monotonic()}) + "\n"
    with file.open("a") as stream:
        operations.reached("write", str(file), tear=lambda: (stream.write(line[: len(line) // 2]), stream.flush()))
        stream.write(line)


def attempt(folder: Path, *, world_size: int, kill: Kill | None) -> tuple[list[int], list[list[str]]]:
    """One start of a run in its own process group.

    Returns:
        Exit status of each rank, negative for a signal, and the names of the operations of each rank that finished.
    """
    folder.mkdir(exist_ok=True)
    rendezvous = folder.with_name(f"{folder.name}.rendezvous")
    rendezvous.unlink(missing_ok=True)
    logs = [folder.with_name(f"{folder.name}.{rank}.json") for rank in range(world_size)]
    pids: list[int] = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(LIMIT)
                os.setpgid(0, pids[0] if pids else 0)
                if world_size > 1:
                    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
                operations = Operations(folder, rank=rank, kill=kill)
                train(folder, rank=rank, world_size=world_size, operations=operations)
                logs[rank].write_text(json.dumps(operations.names))
                status = 0
            finally:
                os._exit(status)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses, [json.loads(log.read_text()) for log in logs if log.exists()]


def outcome(folder: Path) -> tuple[list[str], dict[str, bytes], list[dict[str, Any]]]:
    """Checkpoints by name, every tensor of the last one as bytes, and the metrics without timings."""
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    tensors = {
        name: tensor.numpy().tobytes() for name, tensor in read_tensors(folder / "checkpoints" / names[-1]).items()
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return names, tensors, [{key: row[key] for key in row if key not in TIMINGS} for row in rows]


def check_newest(folder: Path) -> None:
    """Whatever a kill left, the newest checkpoint that counts holds what was written."""
    config = CheckpointConfig(every=2, keep=1, resume="auto", init=None)
    path = Checkpoints(folder / "checkpoints", config=config, rank=0, world_size=1, about={}).latest()
    if path is not None:
        facts = manifest.read(path)
        facts.check_sums(path, names=facts.files)


def sweep(*, folder: Path, ranks: int) -> list[str]:
    """Kill at every operation of every rank, start again, compare; the names of the operations."""
    statuses, operations = attempt(folder / "reference", world_size=ranks, kill=None)
    assert statuses == [0] * ranks
    expected = outcome(folder / "reference")
    assert expected[0] == [f"step-{STEPS:08d}"] and [row["step"] for row in expected[2]] == [1, 2, 3]
    names = []
    for rank in range(ranks):
        for at, name in enumerate(operations[rank]):
            for torn in [False, True] if name.endswith("torn") else [False]:
                kill = Kill(rank, at, torn)
                run_folder = folder / f"{rank}-{at}-{torn}"
                statuses, _ = attempt(run_folder, world_size=ranks, kill=kill)
                assert statuses == [-signal.SIGKILL] * ranks, f"{kill=} {name=} {statuses=}"
                check_newest(run_folder)
                statuses, _ = attempt(run_folder, world_size=ranks, kill=None)
                assert statuses == [0] * ranks, f"{kill=} {name=} {statuses=}"
                assert outcome(run_folder) == expected, f"{kill=} {name=}"
                names.append(f"{rank} {name}")
    return names


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_kill_at_any_file_operation_changes_nothing(tmp_path, world_size):
    [names] = run(sweep, world_size=1, group=False, timeout=300, folder=tmp_path, ranks=world_size)
    print(len(names), names)
