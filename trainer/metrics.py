"""The numbers of every update: brought to the host in one transfer, kept as one line each of ``metrics.jsonl``."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

FILE = "metrics.jsonl"
FIRST = ("step", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_second")  # in every line, in this order


class Metrics:
    """Collects what one update gives; on rank 0 it becomes a line of ``metrics.jsonl``.

    Once an update, in this order: ``start``, ``add``, ``merge`` as often as there is more, ``write``. What happens
    between ``add`` and the next ``start`` (evaluation, checkpoints) is in no ``seconds``.
    """

    def __init__(self, run_dir: Path, *, rank: int, step: int) -> None:
        """Open the file after ``step`` updates; lines past it, of an attempt that was cut short, go."""
        self._file: IO[str] | None = None
        self._row: dict[str, float] = {}
        self._tokens = 0
        self._started = 0.0
        if rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            cut(run_dir / FILE, after=step)
            self._file = (run_dir / FILE).open("a", encoding="utf-8", buffering=1)  # a line is handed over when whole

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
            self._file.write(json.dumps(row) + "\n")  # floats by repr: they read back to the last bit
        return row

    def sync(self) -> None:
        """Have the lines so far on the disk, before a checkpoint says that they are there."""
        if self._file:
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
        ValueError: a line is no object with a step.
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
        os.truncate(path, keep)  # in place: needs no room on a full disk, and a kill leaves all or nothing of it


def _whole_lines(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Each whole line with the offset in bytes of its end."""
    lines: list[tuple[int, dict[str, float]]] = []
    if not path.exists():
        return lines
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        end += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: must be a JSON object with a step") from error
        lines.append((end, row))
    return lines
