"""The dry run of ``train.py dry_run=true``: say what one rank would take and send, and whether it fits."""

from typing import Protocol

from parallel.config import ParallelConfig, PrecisionConfig
from planner.config import HardwareConfig
from trainer.config import OptimConfig, TrainConfig
from zoo.config import ModelConfig


class Run(Protocol):
    """What of a run is tried; keys as on the command line."""

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    hardware: HardwareConfig
    rank: int


def plan(run: Run, *, world_size: int, choice: str) -> None:
    """Try a run's share of one rank, and print what was found.

    Args:
        run: a checked run.
        world_size: processes that are planned.
        choice: the file that was chosen for the model.

    Raises:
        DoesNotFit: it takes more memory than there is.
    """
    from rich.console import Console

    from planner import dryrun, show  # 1 s, which no other run should wait

    report = dryrun.run(
        model=run.model,
        train=run.train,
        optim_config=run.optim,
        plan=run.parallel,
        precision=run.precision,
        hardware=run.hardware,
        world_size=world_size,
        rank=run.rank,
        choice=choice,
    )
    show.show(report, Console())
    report.check()
