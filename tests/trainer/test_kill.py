"""A kill at any file operation of a save leaves a run that ends as the one that was not killed.

A small training loop over ``Checkpoints`` is killed before each of its file operations in turn, and with each file half
written; then it is started again.
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from killing import Group, Kill, Operations, check_whole, outcome
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
from trainer.metrics import cut

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

STEPS = 3


def train(folder: Path, *, rank: int, ranks: int, operations: Operations) -> None:
    """AdamW on a weight of which each rank holds its rows, a router bias that all hold, and metrics."""
    torch.manual_seed(rank)
    weight = torch.nn.Parameter(torch.randn(8 // ranks, 6))
    bias = torch.zeros(4)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    moments = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    optimizer.state[weight] = moments
    mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None

    def spread(rows: Tensor) -> Tensor:
        return rows.detach() if mesh is None else DTensor.from_local(rows.detach(), mesh, [Shard(0)])

    state = {
        "model": {"weight": spread(weight), "balance_bias": bias},
        "optimizer": {name: spread(leaf) if leaf.ndim else leaf for name, leaf in moments.items()},
    }
    config = CheckpointConfig(every=2, keep=1, resume="auto", init=None)
    checkpoints = Checkpoints(folder / "checkpoints", config=config, rank=rank, world_size=ranks, about={"width": 6})
    progress = checkpoints.restore(state)
    step = 0 if progress is None else progress["step"]
    if rank == 0:
        for name in ("metrics.jsonl", "experts.jsonl"):
            cut(folder / name, after=step)
    while step < STEPS:
        torch.manual_seed(1000 + step)
        loss = (torch.randn(5, 6) @ weight.T - bias.mean()).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        bias += 0.001 * torch.sign(total - torch.arange(4))
        step += 1
        if rank == 0:
            row = {"step": step, "loss": total.item(), "seconds": time.monotonic()}
            write_line(folder / "metrics.jsonl", row, operations=operations)
            write_line(folder / "experts.jsonl", {"step": step, "loads": bias.tolist()}, operations=operations)
        if step % config.every == 0 or step == STEPS:
            checkpoints.save(step, state, progress={"step": step})


def write_line(file: Path, row: dict[str, Any], *, operations: Operations) -> None:
    line = json.dumps(row) + "\n"
    with file.open("a") as stream:

        def tear() -> None:
            stream.write(line[: len(line) // 2])
            stream.flush()

        operations.reached("write", str(file), tear=tear)
        stream.write(line)


def attempt(folder: Path, *, ranks: int, kill: Kill | None) -> list[int]:
    """One start of a run; the exit status of each rank. Ranks that finish leave the names of their operations."""
    folder.mkdir(exist_ok=True)
    rendezvous = folder.with_suffix(".rendezvous")
    rendezvous.unlink(missing_ok=True)

    def work(rank: int) -> None:
        if ranks > 1:
            dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=ranks)
        operations = Operations(folder, rank=rank, kill=kill)
        train(folder, rank=rank, ranks=ranks, operations=operations)
        folder.with_suffix(f".{rank}").write_text(json.dumps(operations.names))

    return Group(work, ranks=ranks, log=folder.with_suffix(".log")).wait()


def sweep(*, folder: Path, ranks: int) -> list[str]:
    """Kill at every operation of every rank, start again, compare; the names of the operations."""
    reference = folder / "reference"
    assert attempt(reference, ranks=ranks, kill=None) == [0] * ranks, reference.with_suffix(".log").read_text()
    expected = outcome(reference)
    assert expected.checkpoints == [f"step-{STEPS:08d}"]
    assert [row["step"] for row in expected.rows] == list(range(1, STEPS + 1))
    done = []
    for rank in range(ranks):
        for at, name in enumerate(json.loads(reference.with_suffix(f".{rank}").read_text())):
            for torn in [False, True] if name.endswith("(can be torn)") else [False]:
                killed = folder / f"{rank}-{at}-{torn}"
                says = f"{rank=} {at=} {torn=} {name=}"
                statuses = attempt(killed, ranks=ranks, kill=Kill(rank, at, torn))
                assert statuses == [-signal.SIGKILL] * ranks, f"{says} {statuses=}"
                check_whole(killed)
                statuses = attempt(killed, ranks=ranks, kill=None)
                assert statuses == [0] * ranks, f"{says} {statuses=}\n{killed.with_suffix('.log').read_text()}"
                assert outcome(killed) == expected, says
                done.append(f"{rank} {name}")
    return done


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_at_any_file_operation_changes_nothing(tmp_path, ranks):
    [done] = run(sweep, world_size=1, group=False, timeout=300, folder=tmp_path, ranks=ranks)
    for rank in range(ranks):
        assert f"{rank} open __{rank}_0.distcp" in done
    for name in ("rename .step-00000002.tmp", "rename step-00000002", "fsync manifest.json (can be torn)"):
        assert f"0 {name}" in done
    assert len(done) >= 40
