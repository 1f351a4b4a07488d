"""The numbers of every update: brought to the host in one transfer, kept as one line each of ``metrics.jsonl``."""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.record import whole, writing

FILE = "metrics.jsonl"
LOADS = "experts.jsonl"
NUMBERS = {FILE: ("step", "loss"), LOADS: ("step",)}  # in every line of a file: without them it is damaged
FIRST = ("step", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_second")  # in every line, in this order


class MetricsError(ValueError):
    """A damaged line of ``metrics.jsonl``; the message is one line and names it."""


class Metrics:
    """Collects what one update gives; on rank 0 it becomes a line of ``metrics.jsonl``, loads one of ``experts.jsonl``.

    Once an update, in this order: ``start``, ``add``, ``merge`` as often as there is more, ``write``. What happens
    between ``add`` and the next ``start`` (evaluation, checkpoints) is in no ``seconds``.
    """

    def __init__(self, run_dir: Path, *, rank: int, step: int) -> None:
        """Go on after ``step`` updates; lines past it, of an attempt that was cut short, go.

        Where that attempt's checkpoints were set aside, copies of its files are put beside them.

        Raises:
            MetricsError: a line of a file is damaged.
        """
        self._row: dict[str, float] = {}
        self._tokens = 0
        self._started = 0.0
        self._rows, self._loads = (Lines(run_dir / name, writes=rank == 0, after=step) for name in (FILE, LOADS))

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
        self._rows.append(row)
        return row

    def add_loads(self, step: int, loads: Mapping[str, Sequence[float]]) -> None:
        """Append tokens of every expert to ``experts.jsonl`` on rank 0.

        Args:
            step: number of the update.
            loads: of each layer with experts, by its name.
        """
        self._loads.append({"step": step, "loads": {name: [round(n) for n in each] for name, each in loads.items()}})

    def sync(self) -> None:
        """Have the lines so far on the disk, before a checkpoint says that they are there."""
        for lines in (self._rows, self._loads):
            lines.sync()

    def close(self) -> None:
        """Close the files."""
        for lines in (self._rows, self._loads):
            lines.close()


class Lines:
    """A file of one JSON object an update, or one every few; where this rank does not write, nothing."""

    def __init__(self, path: Path, *, writes: bool, after: int) -> None:
        """Drop the lines past update ``after``; the file is made with its first line.

        Raises:
            MetricsError: a line of the file is damaged.
        """
        self._path, self._writes = path, writes
        self._file: FileIO | None = None
        if writes:
            copy_aside(path, after=after)
            cut(path, after=after)

    def append(self, row: Mapping[str, object]) -> None:
        """Write a line."""
        if not self._writes:
            return
        line = f"{json.dumps(row)}\n".encode()  # floats by repr: they read back to the last bit
        with writing(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)  # nothing is left to write when a full disk refuses
            while line:  # a disk that fills up takes a part, then refuses
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Have the lines so far on the disk."""
        if self._file:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def to_floats(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of one device as numbers, in one transfer."""
    return {name: number for name, (number,) in to_numbers(tensors).items()}


def to_numbers(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Tensors of one device as numbers, in one transfer; float64 holds every narrower dtype exactly."""
    if not tensors:
        return {}
    flat = [value.detach().reshape(-1).to(torch.float64) for value in tensors.values()]
    numbers = iter(torch.cat(flat).tolist())
    return {name: [next(numbers) for _ in range(len(part))] for name, part in zip(tensors, flat, strict=True)}


def to_lists(x: Tensor) -> list[list[float]]:
    """A matrix as numbers, in one transfer."""
    rows: list[list[float]] = x.tolist()
    return rows


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``, in order; none if there is no file. A last line torn by a kill is left out.

    Raises:
        MetricsError: a line is no object with step and loss.
    """
    return [row for _, row in _whole_lines(path)]


def read_loads(path: Path) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """Steps and loads by layer of the lines of an ``experts.jsonl``, in order; as ``read``."""
    for _, row in _whole_lines(path):
        yield int(row["step"]), row["loads"]


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
    if not (aside / path.name).exists() and steps and max(steps) > after and lines and lines[-1]["step"] > after:
        content = path.read_bytes()
        with whole(aside / path.name) as partial:
            partial.write_bytes(content)


def _matches(folder: Path, pattern: str) -> list[re.Match[str]]:
    """Whole names of a folder that follow a pattern; none if there is no folder."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [found for name in names if (found := re.fullmatch(pattern, name))]


def _whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole line with the offset in bytes of its end."""
    if not path.exists():
        return
    end, keys = 0, NUMBERS.get(path.name, ("step",))
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn
            end += len(line)
            try:
                row = json.loads(line)
                damaged = not all(type(row[key]) in (int, float) for key in keys)
            except (ValueError, KeyError, TypeError):
                damaged = True
            if damaged:
                raise MetricsError(f"{path}, line {number}: must be a JSON object with numbers as {' and '.join(keys)}")
            yield end, row
