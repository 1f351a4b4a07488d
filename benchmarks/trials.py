"""Runs of train.py side by side, for curves: each in its own process on one core, kept and not made again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        name: of its folder.
        words: of its command line.
    """

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """What a run recorded, a line an update."""

    rows: list[dict[str, float]]

    @property
    def final(self) -> float:
        """Validation loss after the last update, nats a token."""
        return self.rows[-1]["val_loss"]

    def validation(self) -> tuple[list[float], list[float]]:
        """Updates and validation losses of all evaluations."""
        evaluated = [row for row in self.rows if "val_loss" in row]
        return [row["step"] for row in evaluated], [row["val_loss"] for row in evaluated]

    def reaches(self, loss: float) -> int | None:
        """Updates until the validation loss is at most ``loss``; None: it never is."""
        return next((int(step) for step, value in zip(*self.validation(), strict=True) if value <= loss), None)


def run(trials: Iterable[Trial], *, folder: Path, workers: int) -> dict[str, Curve]:
    """Make every run that ``folder`` does not hold yet, so many at a time; their curves by name.

    Raises:
        subprocess.CalledProcessError: a run failed; its output is on standard error.
    """
    todo = list(trials)
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip([each.name for each in todo], pool.map(lambda each: _curve(each, folder), todo), strict=True))


def _curve(trial: Trial, folder: Path) -> Curve:
    run_dir = folder / trial.name
    words = [*trial.words, f"run_dir={run_dir}", "log.wandb=disabled", "checkpoint.every=0"]
    print(f"{trial.name}: python train.py {' '.join(trial.words)}", flush=True)
    subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    print(f"{trial.name}: validation loss {rows[-1]['val_loss']:.4f}", flush=True)
    return Curve(rows)
