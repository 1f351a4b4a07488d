"""What a run shows while it goes: the console line, Weights & Biases, the loss curve. The only import of wandb."""

import json
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from rich.console import Console

from trainer.config import LogConfig, Wandb
from trainer.console import Progress
from trainer.curve import Curve
from trainer.experts import HeatMap
from trainer.metrics import FILE, LOADS, read, read_loads
from trainer.record import whole, writing

if TYPE_CHECKING:
    from wandb import Run

REACH = 3.0  # seconds the server gets to answer at all: without this test the client retries a dead network for 16
INIT = 6.0  # seconds it gets to open a run, of which its own client knows one less
FINISH = 10.0  # seconds it gets at the end for what is not uploaded yet; `wandb sync` sends the rest later
RUN_ID = "wandb/run-id"

Result = TypeVar("Result")


class Unreachable(RuntimeError):
    """Weights & Biases cannot be used online; the message says why, in one line."""


class Log:
    """Shows every update that ``metrics.jsonl`` gets; on ranks other than 0 it does nothing.

    A context: leaving it draws the pictures once more, gives the terminal back and ends the Weights & Biases run.
    """

    def __init__(
        self,
        config: LogConfig,
        *,
        run_dir: Path,
        rank: int,
        steps: int,
        settings: Mapping[str, object],
        entropy: float | None = None,
        console: Console | None = None,
    ) -> None:
        """Open the log of a run, or go on with it: updates already in ``metrics.jsonl`` are in the curve.

        Args:
            config: what to show.
            run_dir: the run's folder.
            rank: of this process.
            steps: number of the run's last update.
            settings: the resolved config as plain values; Weights & Biases keeps it.
            entropy: of the corpus's single tokens in nats, drawn as a line, where it is known.
            console: standard error if none is given.
        """
        self.config = config
        self._writes = rank == 0
        if not self._writes:
            return
        console = console or Console(stderr=True)
        self._curve = Curve(run_dir / "plots" / "loss.png", title=run_dir.name, axis=config.curve, entropy=entropy)
        self._experts = HeatMap(run_dir / "plots" / "experts.png", title=run_dir.name)
        before = read(run_dir / FILE)
        for row in before:
            self._curve.add(row)
        for step, loads in read_loads(run_dir / LOADS):
            self._experts.add(step, loads)
        self._progress = Progress(total=steps, every=config.every, console=console)
        self._run = None
        if before and before[-1]["step"] >= steps:  # Weights & Biases would get an empty attempt
            self.say(
                f"{run_dir}: its {steps} updates are made; a larger train.steps goes on, another run_dir starts anew"
            )
        else:
            self._run = _open_run(config, run_dir=run_dir, settings=settings, say=self.say)
        self._step = self._drawn = 0  # latest update shown, and the one that the curve was drawn after

    def row(self, row: dict[str, float]) -> None:
        """Show one update, ``row`` being what ``Metrics.write`` returned; draw the pictures if it was evaluated."""
        if not self._writes:
            return
        self._step = int(row["step"])
        self._curve.add(row)
        self._progress.update(row)
        if self._run:
            self._run.log(row)
        if "val_loss" in row:
            self._draw()

    def loads(self, step: int, loads: Mapping[str, Sequence[float]]) -> None:
        """Take tokens of every expert, by layer, for the next picture."""
        if self._writes:
            self._experts.add(step, loads)

    def say(self, line: str) -> None:
        """Print a line that is not an update."""
        if self._writes:
            self._progress.say(line)

    def close(self, *, failed: bool = False) -> None:
        """Draw the curve, leave the console, end the Weights & Biases run; waits for its upload a bounded time."""
        if not self._writes:
            return
        self._progress.close()
        try:
            if self._drawn != self._step:
                self._draw()
        finally:
            if self._run:
                self._run.finish(exit_code=int(failed))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(OSError):  # a full disk refuses the curve too; the error that is there already says more
                self.close(failed=True)

    def _draw(self) -> None:
        self._curve.draw()
        pictures = {"loss_curve": self._curve.path}
        if self._experts.draw():
            pictures["expert_load"] = self._experts.path
        self._drawn = self._step
        if self._run:
            import wandb

            with writing(self._curve.path.parents[1] / "wandb"):  # pictures are copied there
                shown = {name: wandb.Image(str(path)) for name, path in pictures.items()}
                self._run.log({**shown, "step": self._step})


def _open_run(
    config: LogConfig, *, run_dir: Path, settings: Mapping[str, object], say: Callable[[str], None]
) -> "Run | None":
    """The Weights & Biases run that ``config`` asks for. One that cannot go online is kept offline, and says so."""
    if config.wandb is Wandb.disabled:
        return None
    import wandb

    run_id = _run_id(run_dir)

    def init(mode: Literal["online", "offline"]) -> "Run":
        return wandb.init(
            project=config.project,
            name=run_dir.name,
            id=run_id,
            dir=run_dir,
            config=dict(settings),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline it is `wandb sync` that joins the attempts
            reinit="create_new",  # leaves alone whatever else the process logs
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT - 1, finish_timeout=FINISH),
        )

    run = None
    if config.wandb is Wandb.online:
        try:
            _reach()
            run = bounded(lambda: init("online"), seconds=INIT, late="opened no run")
            say(f"Weights & Biases: {run.url}")
        except (Unreachable, wandb.Error) as error:
            kept = f"this run is kept offline in {run_dir / 'wandb'}, `wandb sync` sends it"
            say(f"log.wandb=online: {_reason(error)}; {kept}")
            # The client's own process holds the run's id until it is told to stop, and takes its time over it.
            stopping = threading.Thread(target=wandb.teardown, daemon=True)
            stopping.start()
            stopping.join(1.0)
    try:
        run = run or init("offline")
    except wandb.Error as error:
        say(f"log.wandb={config.wandb.value}: {_reason(error)}; this run goes on without Weights & Biases")
        return None
    # Updates made again after a kill have earlier numbers: with the client's own counter they would be refused.
    run.define_metric("*", step_metric="step")
    return run


def _reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _reach() -> None:
    """Raise Unreachable unless the server of Weights & Biases answers in time and there is a key for it."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    server = wandb.setup().settings.base_url
    if not wandb.login(prompt=False, verify=False):
        raise Unreachable(f"no API key for {server} (`wandb login` keeps one)")
    query = json.dumps({"query": "{ __typename }"}).encode()
    request = urllib.request.Request(f"{server}/graphql", data=query, headers={"Content-Type": "application/json"})

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=REACH).close()
        except urllib.error.HTTPError as answer:  # it lives, whatever it thinks of an anonymous question
            answer.close()
        except OSError as error:
            raise Unreachable(f"{server} cannot be reached ({error})") from error

    bounded(ask, seconds=REACH, late=f"{server} gave no answer")  # a name server may take longer than the timeout


def bounded(call: Callable[[], Result], *, seconds: float, late: str) -> Result:
    """The result of ``call``, which runs in a thread of its own.

    Raises:
        Unreachable: it was not done in time; it says ``late`` and the thread is left behind.
    """
    worker = ThreadPoolExecutor(max_workers=1)
    try:
        return worker.submit(call).result(timeout=seconds)
    except TimeoutError as error:
        raise Unreachable(f"{late} in {seconds:g} s") from error
    finally:
        worker.shutdown(wait=False)


def _run_id(run_dir: Path) -> str:
    """The id that every attempt at this run has, made by the first."""
    file = run_dir / RUN_ID
    run_id = file.read_text().strip() if file.exists() else ""
    if not run_id:  # also of a file that a crash has emptied
        run_id = secrets.token_hex(4)
        with whole(file) as partial:
            partial.write_text(run_id)
    return run_id
