"""What looks at updates while they are made: outliers and what made them, details, traces."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from trainer.config import LogConfig, TrainConfig
from trainer.config_schedule import ScheduleConfig
from trainer.detail import Detail
from trainer.engine import TorchEngine
from trainer.guard import Diverged, Guard, Verdict
from trainer.metrics import to_floats, to_numbers
from trainer.profile import Profile
from trainer.schedule import Schedule
from trainer.spikes import Spikes
from trainer.state import State


class Watch:
    """The looks that a run's config asks for, in the order in which an update meets them."""

    def __init__(
        self,
        log: LogConfig,
        *,
        train: TrainConfig,
        schedule: ScheduleConfig,
        engine: TorchEngine,
        state: State,
        folder: Path,
    ) -> None:
        """Go on where the run stands.

        Args:
            log: what to look at.
            train: which updates are outliers, and whether they are skipped.
            schedule: of the run; it says which rows an update has.
            engine: what makes updates.
            state: of the run; its history is kept up to date.
            folder: of the run.
        """
        mesh, line = engine.mesh, Schedule.of(schedule, train=train).timeline
        self.log, self.skips = log, train.skip
        self.state = state
        self._guard = Guard(train.outliers, skips=train.skip, history=state.history)
        self._verdict: Verdict | None = None
        self._spikes, self._detail, self._profile = None, None, None
        if log.spikes or train.skip:
            self._spikes = Spikes(
                list(engine.shapes),
                window=train.outliers.window,
                history=state.history,
                folder=folder,
                writes=mesh.rank == 0,
                rows=lambda batch: range(line.before(batch), line.before(batch + 1)),
                step=state.step,
            )
        if log.detail:
            self._detail = Detail(engine.model, mesh, shapes=engine.shapes)
            engine.measure()
        if log.profile is not None:
            self._profile = Profile(log.profile, folder=folder, rank=mesh.rank, device=mesh.device)

    @property
    def details(self) -> bool:
        """Whether an update's details are wanted."""
        return self._detail is not None and self._detail.due

    @contextmanager
    def update(self, *, say: Callable[[str], None]) -> Iterator[None]:
        """Around one update."""
        step = self.state.step + 1
        if self._detail is not None and step % self.log.detail_every == 0:
            self._detail.begin()
        if self._profile is None:
            yield
            return
        with self._profile.update(step, say=say):
            yield

    def admits(self, *, loss: Tensor, squares: Tensor) -> bool:
        """Whether gradients may change the parameters; under ``train.skip`` the host waits for the device.

        Args:
            loss: of the update, on all ranks the same.
            squares: of the gradient norm of each parameter, likewise.
        """
        if not self.skips:
            return True
        numbers = to_floats({"loss": loss, "grad_norm": squares.sum().sqrt()})
        self._verdict = self._guard.judge(step=self.state.step + 1, loss=numbers["loss"], norm=numbers["grad_norm"])
        return not self._verdict.skips and self._verdict.ends is None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what changes the parameters (an all-reduce over pp, fsdp and tp where details are due)."""
        if self._detail is None:
            yield
            return
        with self._detail.updating():
            yield

    def read(self, tensors: dict[str, Tensor], *, squares: Tensor, say: Callable[[str], None]) -> dict[str, float]:
        """An update's scalars on the host, details among them, once it is made (for details, over all axes).

        One transfer brings them all. What stands out is told and written; every rank sees the same numbers.

        Args:
            tensors: scalars by key, ``loss`` and ``grad_norm`` among them.
            squares: of the gradient norm of each parameter.
            say: takes a line for people.

        Raises:
            Diverged: the run's numbers are lost.
        """
        if self._detail is not None and self._detail.due:
            tensors = tensors | self._detail.read(squares)
        parts = {} if self._spikes is None else {"squares": squares}
        found = to_numbers(tensors | parts)
        numbers = {key: found[key][0] for key in tensors}
        step, loss = self.state.step, numbers["loss"]
        verdict = self._verdict or self._guard.judge(step=step, loss=loss, norm=numbers["grad_norm"])
        self._verdict = None
        if self._spikes is not None:
            told = self._spikes.note(verdict, step=step, loss=loss, squares=found["squares"])
            if told is not None:
                say(told)
        if verdict.ends is not None:
            raise Diverged(verdict.ends)
        return numbers | ({"skipped": float(verdict.skips)} if self.skips else {})
