"""What makes a folder a whole checkpoint: ``manifest.json``, written last, with the size and SHA-256 of every file.

DCP and ``torch.load`` take a file with flipped bytes for good; only these sums notice. No torch in this file.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "manifest.json"
HASH_THREADS = 4  # hashlib releases the GIL; one core hashes about as fast as one disk reads

_ABSENT = object()


class CheckpointError(ValueError):
    """A fault of a checkpoint that a user can mend; the message is one line."""


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The facts of one checkpoint.

    ``about`` identifies the model, ``progress`` is the run's own state, ``values`` are the leaves of the saved state
    that are not tensors, by dotted name, and ``files`` the records by file name.
    """

    step: int
    about: dict[str, Any]
    progress: dict[str, Any]
    values: dict[str, Any]
    files: dict[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` with a sum over its own content, down to the disk."""
        content = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))  # as a reader will see it
        with (folder / NAME).open("w") as file:
            json.dump({**content, "sha256": _sum(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def check_sizes(self, folder: Path) -> None:
        """Compare the size of every file with its record.

        Raises:
            CheckpointError: a file is missing or has another size.
        """
        for name, record in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"checkpoint file {path} is missing")
            size = path.stat().st_size
            if size != record.bytes:
                raise CheckpointError(f"checkpoint file {path} has {size} bytes, its manifest says {record.bytes}")

    def check_sums(self, folder: Path, *, names: Iterable[str]) -> None:
        """Read the named files and compare their SHA-256 with their records.

        Raises:
            CheckpointError: a file holds other bytes than were written.
        """
        for name, record in fingerprint(folder, names=names).items():
            if record != self.files[name]:
                raise CheckpointError(f"checkpoint file {folder / name} is damaged: its SHA-256 is not the manifest's")


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; every file is there and has its size.

    Raises:
        CheckpointError: there is no manifest, it is damaged or of another format, or a file's size is wrong.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder} is not whole: it has no {NAME}")
    try:
        content = json.loads(path.read_bytes())
        expected = content.pop("sha256")
        damaged = expected != _sum(content)
    except (ValueError, KeyError, AttributeError, TypeError):  # whatever a flipped byte makes of JSON
        damaged = True
    if damaged:
        raise CheckpointError(f"checkpoint file {path} is damaged: its SHA-256 is not the one written in it")
    if content["format"] != FORMAT:
        raise CheckpointError(f"checkpoint file {path} has format={content['format']}: must be {FORMAT}")
    content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
    manifest = Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
    manifest.check_sizes(folder)
    return manifest


def fingerprint(folder: Path, *, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of each named file, by name, several files at a time."""

    def record(name: str) -> FileRecord:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileRecord(bytes=file.tell(), sha256=digest)

    names = sorted(names)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(record, names), strict=True))


def first_difference(saved: Any, wanted: Any, *, key: str = "") -> str | None:
    """Compare two trees as JSON would store them.

    Returns:
        The first key that differs with both values, such as ``d_model is 64, not 128``; None if they are equal.
    """
    if isinstance(saved, dict) and isinstance(wanted, dict):
        pairs = [(name, saved.get(name, _ABSENT), wanted.get(name, _ABSENT)) for name in {**wanted, **saved}]
    elif isinstance(saved, list | tuple) and isinstance(wanted, list | tuple) and len(saved) == len(wanted):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(saved, wanted, strict=True))]
    else:
        same = type(saved) is type(wanted) and saved == wanted
        return None if same else f"{key} is {_show(saved)}, not {_show(wanted)}"
    found = (first_difference(a, b, key=f"{key}.{name}".lstrip(".")) for name, a, b in pairs)
    return next((difference for difference in found if difference is not None), None)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk: a rename or a new file is not durable before."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _show(value: object) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
