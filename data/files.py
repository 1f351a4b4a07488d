"""Files that are either whole or not there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError

PARTIAL = ".partial"  # ends the name of a file that is still being written
LOCK = ".lock"


def write_whole(path: Path, *, content: bytes) -> None:
    """Write a file so that it is seen complete or not at all, a power cut included.

    Raises:
        DataError: The disk is full or the folder refuses.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path), open(partial, "wb") as file:
        file.write(content)
        publish(file.fileno(), partial=partial, path=path)


def publish(descriptor: int, *, partial: Path, path: Path) -> None:
    """Give a finished file its name once its bytes are on the disk."""
    os.fsync(descriptor)
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it the name may be lost though the bytes are there
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a refusal of the file system into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold ``folder`` for this process alone; the system lets go of it even after a SIGKILL.

    Raises:
        DataError: Another process holds it and ``wait`` is false, or the folder cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, folder=folder, wait=wait)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, *, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{folder}: another process is preparing it") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be locked: {error.strerror}") from error
