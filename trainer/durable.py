"""Changes of files that a kill or a power cut cannot leave half done."""

import json
import os
from pathlib import Path

from trainer.manifest import CheckpointError


def cut(metrics_file: Path, *, step: int) -> None:
    """Remove the lines past ``step`` and a torn last line from a file of one JSON object a line, atomically.

    Call it on one rank, before the first update after a start; a missing file stays missing.

    Raises:
        CheckpointError: a line other than the last is no JSON object with a ``step``.
    """
    if not metrics_file.exists():
        return
    before = metrics_file.read_bytes()
    lines = before.splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            past = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise CheckpointError(f"{metrics_file} line {number} is not an update's metrics") from None
            past = True
        if not past:
            kept.append(line + b"\n")
    after = b"".join(kept)
    if after != before:
        write_atomically(metrics_file, after)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content; a kill or power cut at any moment leaves the old or the new content, both whole."""
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk: a rename or a new file is not durable before."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
