"""How a run ends: its exit status, one line for a user's error, and ``status.json`` for whoever watches."""

import errno
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from conf.schema import ConfigError, explain

REFUSED = 2  # exit status of what a user can correct
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as a shell reports them
OTHERS_WAIT = 10.0  # seconds; on a loaded machine rank 0 takes over 3 to leave
STATUS = "status.json"
LOCK = ".lock"
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks, as Lustre may be mounted

log = logging.getLogger(__name__)
Errors = tuple[type[Exception], ...]


class Terminated(SystemExit):
    """SIGTERM has come: the run ends as at an interruption, its files written."""


@contextmanager
def refusing(errors: Errors, *, rank: int, lost: Callable[[BaseException], bool]) -> Iterator[None]:
    """Make an error of the given kinds one line on standard error and exit status 2; an interruption one and 130.

    Args:
        errors: what a user can correct.
        rank: of this process.
        lost: whether an error only tells that another process is gone. Rank 0 shows it; the others say nothing, since
            what happened was elsewhere.
    """
    try:
        yield
    except KeyboardInterrupt:
        if rank == 0:
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except errors as error:
        if rank != 0:
            # What is wrong for all, rank 0 says, and its launcher ends us; we speak when the fault is ours alone.
            time.sleep(OTHERS_WAIT)
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(REFUSED)
    except RuntimeError as error:
        if rank == 0 or not lost(error):
            raise
        time.sleep(OTHERS_WAIT)  # the launcher names the first process to end, which has to be the one at fault
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
def outcome(run_dir: Path, *, errors: Errors, rank: int) -> Iterator[None]:
    """Keep ``<run_dir>/status.json`` true on rank 0, and the folder this run's alone.

    It says running, then finished, stopped by a signal, or failed with the error's line. An error of the kinds that a
    user can correct stays the one that is raised, whatever signal comes while it is on its way out.

    Raises:
        ConfigError: ``run_dir`` cannot be a folder to write to, or another process trains in it.
    """
    if rank != 0:
        yield
        return
    with _alone(run_dir):
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            _write(run_dir, outcome="running", message="")
            yield
            _write(run_dir, outcome="finished", message="")
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left to do takes no time
            first = _first(error, errors=errors)
            _end(run_dir, first)
            if first is not error:
                raise first from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it even after a SIGKILL."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: must be a folder to write to: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigError(f"run_dir={run_dir}: another run is going on there; wait for it or choose another") from error
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            os.close(handle)
            raise ConfigError(f"run_dir={run_dir}: cannot be locked: {error.strerror}") from error
        log.warning("run_dir=%s: its file system has no locks; see to it that only one run is there", run_dir)
    try:
        yield
    finally:
        os.close(handle)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(TERMINATED)


def _first(error: BaseException, *, errors: Errors) -> BaseException:
    """The user's error that a signal has come upon while it was on its way out, else the error itself."""
    earlier: BaseException | None = error
    while isinstance(earlier, KeyboardInterrupt | Terminated):
        earlier = earlier.__context__
    return earlier if isinstance(earlier, errors) else error


def _end(run_dir: Path, error: BaseException) -> None:
    """Write how the run has ended; what cannot be written must not go on saying that it runs."""
    stopped = isinstance(error, KeyboardInterrupt | Terminated)
    message = explain(error)
    if stopped:
        message = "SIGTERM" if isinstance(error, Terminated) else "SIGINT"
        if isinstance(error.__context__, RuntimeError):  # such as a connection lost to another process that stops
            message += f" after: {explain(error.__context__)}"
    try:
        _write(run_dir, outcome="stopped" if stopped else "failed", message=message)
    except OSError:
        with suppress(OSError):  # a disk that takes nothing and lets nothing go: the error in flight says so
            (run_dir / STATUS).unlink(missing_ok=True)


def _write(run_dir: Path, *, outcome: str, message: str) -> None:
    """Write ``status.json``, whole or not at all."""
    path, partial = run_dir / STATUS, run_dir / f".{STATUS}"
    try:
        partial.write_text(json.dumps({"outcome": outcome, "message": message, "time": time.time()}) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
