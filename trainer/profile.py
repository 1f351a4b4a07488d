"""A trace of some updates by torch.profiler, for chrome://tracing or https://ui.perfetto.dev."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from trainer.record import writing


class Profile:
    """Traces updates ``first`` to ``last``, or what a restart has left of them; every rank writes a file of its own."""

    def __init__(self, steps: Sequence[int], *, folder: Path, rank: int, device: torch.device) -> None:
        """Remember what to trace; nothing is written.

        Args:
            steps: first and last update, from 1.
            folder: of the run.
            rank: of this process.
            device: where it computes.
        """
        self.first, self.last = steps
        self.path = folder / "profile" / f"rank{rank}.json.gz"
        self._device = device
        self._profiler: torch.profiler.profile | None = None
        self._began = 0

    @contextmanager
    def update(self, step: int, *, say: Callable[[str], None]) -> Iterator[None]:
        """Around an update: begin to trace, or go on, and write the trace after the last."""
        if not self.first <= step <= self.last:
            yield
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
            self._profiler, self._began = torch.profiler.profile(activities=activities), step
            self._profiler.start()
        yield
        if step == self.last:
            self._profiler.stop()
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None
            say(f"updates {self._began} to {step} are traced in {self.path.parent}, a file a rank")
