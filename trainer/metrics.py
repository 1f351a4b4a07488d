"""The numbers of every update: brought to the host in one transfer, kept as one line each of ``metrics.jsonl``."""

import json
import os
import re
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from trainer.record import whole, writing

FILE = "metrics.jsonl"
FIRST = ("step", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_second")  # in every line, in this order


class MetricsError(ValueError):
    """A damaged line of ``metrics.jsonl``; the message is one line and names it."""


class Metrics:
    """Collects what one update gives; on rank 0 it becomes a line of ``metrics.jsonl``.

    Once an update, in this order: ``start``, ``add``, ``merge`` as often as there is more, ``write``. What happens
    between ``add`` and the next ``start`` (evaluation, checkpoints) is in no ``seconds``.
    """

    def __init__(self, run_dir: Path, *, rank: int, step: int) -> None:
        """Open the file after ``step`` updates; lines past it, of an attempt that was cut short, go.

        Where that attempt's checkpoints were set aside, a copy of its lines is put beside them.

        Raises:
            MetricsError: a line of the file is damaged.
        """
        self._path = run_dir / FILE
        self._file: FileIO | None = None
        self._row: dict[str, float] = {}
        self._tokens = 0
        self._started = 0.0
        if rank == 0:
            copy_aside(self._path, after=step)
            cut(self._path, after=step)
            with writing(self._path):
                run_dir.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)  # nothing is left to write when a full disk refuses

    def start(self, *, tokens: int) -> None:
        """Begin timing an update; ``tokens`` is how many were trained on before it."""
        self._tokens = tokens
        self._started = time.perf_counter()

    def add(
        self, *, step: int, tokens: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
    ) -> dict[str, float]:
        """Take an update's results and stop its clock. The one place of a step where the host waits for the device.

        Args:
            step: number of the update, from 1.
            tokens: input tokens trained on so far, this update's among them.
            tensors: scalars on one device, already reduced over the ranks; ``loss`` and ``grad_norm`` at least.
            numbers: what the host knows; ``lr`` at least.

        Returns:
            The tensors' values, on every rank.
        """
        values = to_floats(tensors)
        seconds = time.perf_counter() - self._started
        rate = (tokens - self._tokens) / seconds
        self._row = {"step": step, "tokens": tokens, **values, **numbers, "seconds": seconds, "tokens_per_second": rate}
        missing = [key for key in FIRST if key not in self._row]
        assert not missing, f"{missing=}"
        return values

    def merge(self, numbers: Mapping[str, float]) -> None:
        """Add keys to the update's line, such as ``val_loss``."""
        again = self._row.keys() & numbers.keys()
        assert not again, f"{again=}"
        self._row.update(numbers)

    def write(self) -> dict[str, float]:
        """Append the update's line to the file on rank 0.

        Returns:
            The numbers of the line.
        """
        row = {key: self._row[key] for key in FIRST} | self._row
        if self._file:
            line = f"{json.dumps(row)}\n".encode()  # floats by repr: they read back to the last bit
            with writing(self._path):
                while line:  # a disk that fills up takes a part, then refuses
                    line = line[self._file.write(line) :]
        return row

    def sync(self) -> None:
        """Have the lines so far on the disk, before a checkpoint says that they are there."""
        if self._file:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def to_floats(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of one device as numbers, in one transfer; float64 holds every narrower dtype exactly."""
    if not tensors:
        return {}
    stacked = torch.stack([value.detach().reshape(()).to(torch.float64) for value in tensors.values()])
    return dict(zip(tensors, stacked.tolist(), strict=True))


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``, in order; none if there is no file. A last line torn by a kill is left out.

    Raises:
        MetricsError: a line is no object with step and loss.
    """
    return [row for _, row in _whole_lines(path)]


def cut(path: Path, *, after: int) -> None:
    """Drop the lines past step ``after`` and a torn last one, so that an update made again has one line.

    Example: lines of steps 1 2 3 4 and half of 5, ``after`` 3, leave 1 2 3.
    """
    keep = 0
    for end, row in _whole_lines(path):
        if row["step"] > after:
            break
        keep = end
    if path.exists():
        with writing(path):
            os.truncate(path, keep)  # in place: needs no room on a full disk, and a kill leaves all or nothing of it


def copy_aside(path: Path, *, after: int) -> None:
    """Copy the file to the latest ``checkpoints/replaced-N`` if its steps past ``after`` were set aside there.

    To be called before ``cut``. Once the copy is there it stays as it is, so a kill between the two changes nothing.
    """
    folders = {int(found[1]): found[0] for found in _matches(path.parent / "checkpoints", r"replaced-(\d+)")}
    if not folders or not path.exists():
        return
    aside = path.parent / "checkpoints" / folders[max(folders)]
    steps = [int(found[1]) for found in _matches(aside, r"step-(\d{8,})")]
    lines = read(path)
    if not (aside / FILE).exists() and steps and max(steps) > after and lines and lines[-1]["step"] > after:
        content = path.read_bytes()
        with whole(aside / FILE) as partial:
            partial.write_bytes(content)


def _matches(folder: Path, pattern: str) -> list[re.Match[str]]:
    """Whole names of a folder that follow a pattern; none if there is no folder."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [found for name in names if (found := re.fullmatch(pattern, name))]


def _whole_lines(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Each whole line with the offset in bytes of its end."""
    lines: list[tuple[int, dict[str, float]]] = []
    if not path.exists():
        return lines
    end = 0
    *complete, _ = path.read_bytes().split(b"\n")  # what follows the last newline is torn, or nothing
    for number, line in enumerate(complete, start=1):
        end += len(line) + 1
        try:
            row = json.loads(line)
            damaged = not all(type(row[key]) in (int, float) for key in ("step", "loss"))
        except (ValueError, KeyError, TypeError):
            damaged = True
        if damaged:
            raise MetricsError(f"{path}, line {number}: must be a JSON object with numbers as step and loss")
        lines.append((end, row))
    return lines
