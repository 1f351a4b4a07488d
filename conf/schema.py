"""The shape of a run: every room's config under one root, checked before anything is built."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.fitting import check_clip, check_model, check_theta
from data.config import DataConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.config_fit import Sizes, accumulation, check_pipeline, fit
from planner.config import HardwareConfig
from trainer.config import CheckpointConfig, EngineConfig, LogConfig, OptimConfig, TrainConfig
from trainer.config_schedule import ScheduleConfig
from trainer.config_timeline import stages
from zoo.config import ModelConfig


@dataclass
class RunConfig:
    """A run: architecture × data × plan × optimizer, and how it is recorded."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    train: TrainConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    parallel: ParallelConfig = MISSING
    precision: PrecisionConfig = MISSING
    engine: EngineConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    log: LogConfig = MISSING
    hardware: HardwareConfig = MISSING
    seed: int = MISSING
    run_dir: str = MISSING
    dry_run: bool = False  # one rank's share is traced without memory, devices or the other ranks
    world_size: int | None = None  # of a dry run: how many processes are planned; null: as many as are started
    rank: int = 0  # of a dry run: whose share


FOLDER = Path(__file__).parent


class ConfigError(ValueError):
    """A value that a user wrote and can correct, in one line."""


def register() -> None:
    """Make the schema known to Hydra under the name that ``conf/train.yaml`` asks for."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def resolve(cfg: DictConfig) -> RunConfig:
    """Turn what Hydra composed into dataclasses; every ``__post_init__`` check runs here.

    Raises:
        ConfigError: a value is missing, ill-typed or not allowed.
    """
    try:
        run = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    except ValueError as error:
        raise ConfigError(_full_key(str(error), cfg) or str(error)) from error
    assert isinstance(run, RunConfig), f"{type(run)=}"
    return run


def check_words(words: Sequence[str]) -> None:
    """Whether words of a command line choose a file for every group that they name: Hydra fails on ``model=null``.

    A model of which there is only a card has no file.

    Raises:
        ConfigError: one does not.
    """
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key == "model" and value in OmegaConf.load(FOLDER / "cards.yaml").unpublished:
            raise ConfigError(f"{word}: its dimensions are unpublished; python -m zoo {value} says what is known")
        if value in ("null", "") and (FOLDER / key).is_dir():
            names = ", ".join(sorted(path.stem for path in (FOLDER / key).glob("*.yaml")))
            raise ConfigError(f"{word}: must be one of {names}")


@contextmanager
def composing(words: Sequence[str]) -> Iterator[None]:
    """Make one line of what Hydra cannot say of a command line.

    Raises:
        ConfigError: a word chooses no file, or sets a value inside a slot that this run leaves empty.
    """
    check_words(words)
    try:
        yield
    except (AssertionError, AttributeError) as error:  # what OmegaConf raises for a value inside an empty slot
        choices = [word for word in words if "." not in word.partition("=")[0]]
        for word in words:
            if not _composes([*choices, word]):
                raise ConfigError(f"{word}: cannot be set, a part of its path is an empty slot (null) here") from error
        raise


def _composes(words: list[str]) -> bool:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(FOLDER), version_base=None):
        try:
            compose("train", overrides=words)
        except (AssertionError, AttributeError):
            return False
    return True


def check(run: RunConfig, *, world_size: int) -> Sizes:
    """Everything that two parts of a run must agree on.

    Returns:
        The plan, fitted to the processes.

    Raises:
        ConfigError: parts that do not fit, by their keys.
    """
    if not run.run_dir:
        raise ConfigError("run_dir=: must name a folder")
    if run.world_size is not None and not run.dry_run:
        raise ConfigError(f"world_size={run.world_size}: must be null, as many as are started, unless dry_run=true")
    if run.world_size is not None and run.world_size < 1:
        raise ConfigError(f"world_size={run.world_size}: must be 1 or more")
    if run.rank and not run.dry_run:
        raise ConfigError(f"rank={run.rank}: must be 0 unless dry_run=true; a launcher says which rank a process is")
    try:
        sizes = fit(run.parallel, world_size=world_size)
        if not 0 <= run.rank < sizes.ranks:
            raise ValueError(f"rank={run.rank}: must be one of the {sizes.ranks} processes, from 0")
        t, model = run.train, run.model
        batches = accumulation(global_batch=t.global_batch, micro_batch=t.micro_batch, dp=sizes.dp)
        check_model(model, plan=run.parallel, sizes=sizes, seq_len=t.seq_len)
        check_pipeline(run.parallel, n_layers=model.n_layers, accumulation=batches)
        for _, n in ramp(run):
            _check_stage(run, rows=n, sizes=sizes)
        check_theta(model, run.schedule)
        check_clip(model, run.optim)
        if run.log.profile is not None and run.log.profile[1] > t.steps:
            raise ValueError(f"log.profile={run.log.profile}: must end by train.steps ({t.steps})")
        if t.seq_len > model.context:
            raise ValueError(f"train.seq_len={t.seq_len}: must be at most model.context ({model.context})")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return sizes


def ramp(run: RunConfig) -> tuple[tuple[int, int], ...]:
    """(updates, rows) of the smaller batches that a run begins with."""
    t = run.train
    return stages(run.schedule, steps=t.steps, global_batch=t.global_batch, seq_len=t.seq_len)


def _check_stage(run: RunConfig, *, rows: int, sizes: Sizes) -> None:
    """Whether updates of so many rows can be cut for ranks and pipeline stages.

    Raises:
        ValueError: they cannot.
    """
    try:
        batches = accumulation(global_batch=rows, micro_batch=run.train.micro_batch, dp=sizes.dp)
        check_pipeline(run.parallel, n_layers=run.model.n_layers, accumulation=batches)
    except ValueError as error:
        raise ValueError(f"schedule.batch, {rows} rows: {error}") from error


def chosen(group: str) -> str:
    """Name of the file that the command line has chosen for a group; empty in a program that composes by itself."""
    return str(HydraConfig.get().runtime.choices[group]) if HydraConfig.initialized() else ""


def rows(run: RunConfig) -> dict[str, Any]:
    """What decides which rows a run reads, for ``data.streams.open_streams``."""
    t = run.train
    sizes = {"global_batch": t.global_batch, "micro_batch": t.micro_batch, "seq_len": t.seq_len}
    return {
        "seed": run.seed,
        "n_mtp": run.model.n_mtp,
        "eval_rows": t.eval_rows if t.eval_every else 0,
        "ramp": ramp(run),
        **sizes,
    }


def check_vocabulary(run: RunConfig, *, tokens: int | None) -> None:
    """Whether the model has a row for each of the tokenizer's ``tokens``, where their number is known.

    Raises:
        ConfigError: it has not.
    """
    if tokens is not None and run.model.vocab_size < tokens:
        raise ConfigError(f"model.vocab_size={run.model.vocab_size}: must be at least the tokenizer's {tokens}")


def plain(run: RunConfig) -> dict[str, Any]:
    """A run as plain values, for ``run.yaml`` and trackers."""
    values = OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True)
    assert isinstance(values, dict), f"{type(values)=}"
    return {str(key): value for key, value in values.items()}


def explain(error: BaseException) -> str:
    """An error in one line; for what Hydra or OmegaConf found: the key, the value and what is allowed."""
    for cause in (error, error.__cause__):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            word = re.search(r"override '?([\w.]+)", str(error)) if cause is not error else None
            return _explain_key(cause, word=word[1] if word else "")
    said = str(error).partition("Config search path")[0]  # of a choice that no file has; the choices come before
    return " ".join(said.split()) or type(error).__name__


def _explain_key(error: OmegaConfBaseException, *, word: str) -> str:
    """A fault of a key, which OmegaConf names from the root, or from an item of the list that ``word`` sets."""
    key, first = str(error.full_key), str(error).splitlines()[0]
    if word and not f"{key}.".startswith(f"{word}."):
        key = f"{word}[…].{key}"
    parent, _, name = key.rpartition(".")
    allowed = [str(each) for each in error.parent_node or [] if each != "hydra"]
    if "not in" in first and name not in allowed:
        close = difflib.get_close_matches(name, allowed, n=1)
        hint = f", did you mean {close[0]}?" if close else ";"
        return f"{key}: unknown key{hint} allowed in {parent or 'the root'}: {', '.join(allowed)}"
    return f"{key}: {first}"


def _full_key(said: str, part: DictConfig, *, path: str = "") -> str | None:
    """What a part's check ``said``, with the whole path of the key; None where no check of this part fails.

    Example: ``attention.n_kv_heads=3: must be …`` becomes ``model.blocks.dense.attention.n_kv_heads=3: must be …``.
    """
    for name in map(str, part):
        if not OmegaConf.is_missing(part, name) and isinstance(part[name], DictConfig) and part[name]:
            found = _full_key(said, part[name], path=f"{path}.{name}".lstrip("."))
            if found is not None:
                return found
    try:
        OmegaConf.to_object(part)
    except (OmegaConfBaseException, ValueError) as error:
        if str(error) != said:
            return None
    else:
        return None
    key, _, rest = said.partition("=")
    while key and OmegaConf.select(part, key, default=...) is ...:  # the check names its part in its own way
        key = key.partition(".")[2]
    return f"{path}.{key}".strip(".") + f"={rest}"


USER_ERRORS = (HydraException, OmegaConfBaseException, ConfigError)
"""What a wrong command line or file raises while a run is composed and checked."""
