"""Process groups that are killed at chosen moments, and what is left of a run, for tests. Linux only."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import manifest
from trainer.stored import read_tensors

LIMIT = 60  # seconds after which a process of a hanging group ends by itself
TIMINGS = ("seconds", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Kill:
    """SIGKILL of the whole process group when ``rank`` is about to do its file operation ``at``, counted from 0.

    With ``torn`` the operation is an fsync or a line of metrics, and only half of the content arrives.
    """

    rank: int
    at: int
    torn: bool = False


class Operations:
    """Counts and names this process's file operations in a folder, and kills the process group at the chosen one.

    A file operation is what Python's audit hooks see of opening to write, renaming, making and deleting, and fsync.
    """

    def __init__(self, folder: Path, *, rank: int, kill: Kill | None):
        self.folder = str(folder)
        self.kill = kill if kill is not None and kill.rank == rank else None
        self.names: list[str] = []
        self._fsync = os.fsync
        setattr(os, "fsync", self._synced)  # noqa: B010  # mypy has it that fsync also takes file objects
        sys.addaudithook(self._heard)

    def reached(self, kind: str, path: str, *, tear: Callable[[], object] | None = None) -> None:
        """One operation is about to happen; ``tear`` does half of it."""
        if not path.startswith(self.folder):
            return
        if self.kill is not None and self.kill.at == len(self.names):
            if self.kill.torn:
                assert tear is not None, f"{kind=} {path=}"
                tear()
            os.killpg(os.getpgrp(), signal.SIGKILL)
        self.names.append(f"{kind} {Path(path).name}{'' if tear is None else ' (can be torn)'}")

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | Path) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.reached("open", str(args[0]))
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            folder = "" if args[-1] == -1 else os.readlink(f"/proc/self/fd/{args[-1]}")
            self.reached(event.removeprefix("os."), os.path.join(folder, str(args[0])))

    def _synced(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        is_file = os.path.isfile(path)
        self.reached("fsync", path, tear=(lambda: os.truncate(path, os.path.getsize(path) // 2)) if is_file else None)
        self._fsync(handle)


class Group:
    """Processes forked from this one into a process group of their own, so that one signal ends them all."""

    def __init__(self, work: Callable[[int], None], *, ranks: int, log: Path):
        """Start ``work(rank)`` in each; what they print goes to ``log``. A rank ends by itself after LIMIT seconds."""
        self.pids: list[int] = []
        self.log = log
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if rank else 0)
                signal.alarm(LIMIT)
                _work(work, rank=rank, log=log)
            os.setpgid(pid, self.pids[0] if rank else pid)
            self.pids.append(pid)

    def kill(self) -> None:
        """SIGKILL to all at once."""
        os.killpg(self.pids[0], signal.SIGKILL)

    def wait(self) -> list[int]:
        """Exit status of each rank, -9 where it was killed."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]


def _work(work: Callable[[int], None], *, rank: int, log: Path) -> None:
    """In the child, which never returns."""
    status = 1
    try:
        with log.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        work(rank)
        status = 0
    except BaseException:  # a child that went on would be a second test run
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass(frozen=True)
class Outcome:
    """All that a run leaves and that a kill must not change.

    Attributes:
        checkpoints: their names.
        tensors: dtype, shape and bytes of every tensor of the last checkpoint, by name.
        progress: of the last checkpoint.
        rows: of metrics.jsonl, without timings.
        loads: all of experts.jsonl.
    """

    checkpoints: list[str]
    tensors: dict[str, tuple[str, bytes]]
    progress: dict[str, Any]
    rows: list[dict[str, Any]]
    loads: bytes


def outcome(run_dir: Path) -> Outcome:
    """Read what a finished run left."""
    folder = run_dir / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    stored = read_tensors(folder / names[-1])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        checkpoints=names,
        tensors={name: (str(stored.kinds[name]), stored[name].numpy().tobytes()) for name in stored},
        progress=manifest.read(folder / names[-1]).progress,
        rows=[{key: row[key] for key in row if key not in TIMINGS} for row in rows],
        loads=(run_dir / "experts.jsonl").read_bytes(),
    )


def check_whole(run_dir: Path) -> None:
    """Whatever a kill left, every folder named as a checkpoint holds what was written."""
    for path in (run_dir / "checkpoints").glob("step-*"):
        facts = manifest.read(path)
        facts.check_sums(path, names=facts.files)


def wait_for(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds; looks about every millisecond, for LIMIT seconds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not within {LIMIT} s"
        time.sleep(0.001)
