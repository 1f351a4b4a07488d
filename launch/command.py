"""How a run ends: its exit status, one line for a user's error, and ``status.json`` for whoever watches."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.schema import explain

REFUSED = 2  # exit status of what a user can correct
OTHERS_WAIT = 3.0  # seconds


@contextmanager
def refusing(errors: tuple[type[Exception], ...], *, rank: int) -> Iterator[None]:
    """Make an error of the given kinds one line on standard error and exit status 2."""
    try:
        yield
    except errors as error:
        if rank != 0:
            # What is wrong for all, rank 0 says, and its launcher ends us; we speak when the fault is ours alone.
            time.sleep(OTHERS_WAIT)
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(REFUSED)


def leave(*, processes: int) -> None:
    """End one process of several at once, with status 0; its files are written and its group is left.

    In one of thirty runs of two processes, a thread of gloo's still ran while the interpreter shut down and aborted it;
    the launcher then called a finished run failed.
    """
    if processes > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def outcome(run_dir: Path, *, rank: int) -> Iterator[None]:
    """Keep ``<run_dir>/status.json`` true: running, then finished, or failed with the error's line."""
    if rank != 0:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir, outcome="running", message="")
    try:
        yield
    except BaseException as error:
        _write(run_dir, outcome="failed", message=explain(error))
        raise
    _write(run_dir, outcome="finished", message="")


def _write(run_dir: Path, *, outcome: str, message: str) -> None:
    unfinished = run_dir / ".status.json"
    unfinished.write_text(json.dumps({"outcome": outcome, "message": message, "time": time.time()}) + "\n")
    os.replace(unfinished, run_dir / "status.json")
