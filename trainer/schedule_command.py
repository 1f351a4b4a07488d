"""Look at schedules: ``python -m trainer.schedule SCHEDULE… [schedule.KEY=VALUE…]`` draws them into one picture."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config_check import check
from trainer.config_schedule import Clock, ScheduleConfig
from trainer.config_timeline import Timeline, steps_to
from trainer.schedule import Schedule

CONF = Path(__file__).parents[1] / "conf"
REFUSED = 2  # exit status of what a user can correct
ASSUMED = {"global_batch": 1024, "seq_len": 4096}  # rows of an update, where no conf/train/SCHEDULE.yaml says so


@dataclass(frozen=True)
class Sizes:
    """Of the runs to draw; None: the schedule's own."""

    steps: int | None
    global_batch: int | None
    seq_len: int | None


class Parser(argparse.ArgumentParser):
    """Faults of the command line are errors as all others are: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        """What argparse itself finds wrong.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{message.removeprefix('argument ')}; python -m trainer.schedule --help shows what is allowed"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: 0, or 2 with one line on standard error for what a user can correct.
    """
    try:
        given = _read(arguments)
        names = [word for word in given.words if "=" not in word]
        changes = [word for word in given.words if "=" in word]
        check(bool(names), "SCHEDULE", "none", f"one or more of {', '.join(_names())}, or files")
        sizes = Sizes(given.steps, given.global_batch, given.seq_len)
        found = {name: lay_out(name, changes=changes, sizes=sizes) for name in names}
        from trainer.schedule_plot import draw  # here: the library that draws takes half a second to load

        draw(found, path=Path(given.out))
    except (ValueError, OSError, YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    for name, schedule in found.items():
        print(f"{name}: {describe(schedule)}")
    print(f"drawn to {given.out}")
    return 0


def lay_out(name: str, *, changes: Sequence[str], sizes: Sizes) -> Schedule:
    """A schedule over a run: of the sizes that are given, else as long as published, else of ``conf/train``.

    Raises:
        ValueError: there is no such schedule, or a value is not allowed.
    """
    config = read(name, changes=changes)
    train = _train(Path(name).stem)
    own = (CONF / "train" / f"{Path(name).stem}.yaml").is_file()
    usual = train if own or config.length is None else ASSUMED
    rows = usual["global_batch"] if sizes.global_batch is None else sizes.global_batch
    seq_len = usual["seq_len"] if sizes.seq_len is None else sizes.seq_len
    check(rows > 0, "--global-batch", rows, "above 0")
    check(seq_len > 0, "--seq-len", seq_len, "above 0")
    steps = sizes.steps
    if steps is None:
        steps = steps_to(config, global_batch=rows, seq_len=seq_len) or train["steps"]
    check(steps > 0, "--steps", steps, "above 0")
    return Schedule(config, Timeline.of(config, steps=steps, global_batch=rows, seq_len=seq_len))


def read(name: str, *, changes: Sequence[str]) -> ScheduleConfig:
    """A file of ``conf/schedule``, or any YAML file, with ``schedule.KEY=VALUE`` words.

    Raises:
        ValueError: there is no such file, a key is unknown, or a value ill-typed or not allowed.
    """
    path = Path(name) if name.endswith(".yaml") else CONF / "schedule" / f"{name}.yaml"
    if not path.is_file():
        close = get_close_matches(name, _names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"SCHEDULE={name}: must be one of {', '.join(_names())}, or a .yaml file{hint}")
    for word in changes:
        check(word.startswith("schedule."), "words", word, "SCHEDULE or schedule.KEY=VALUE")
    try:
        words = OmegaConf.from_dotlist([word.removeprefix("schedule.") for word in changes])
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ScheduleConfig), _load(path), words))
    except OmegaConfBaseException as error:
        raise ValueError(f"schedule.{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, ScheduleConfig), f"{type(config)=}"
    return config


def describe(schedule: Schedule) -> str:
    """The run that is drawn, in words.

    Example: ``200 updates, 20 of warmup, ends at 0.1 of the peak``; with rows and tokens where these matter.
    """
    line, config = schedule.timeline, schedule.config
    size = ""
    if config.clock is Clock.tokens or line.ramp:
        rows = sorted({line.rows, *(rows for _, rows in line.ramp)})
        batch = f"{rows[0]:,} to {rows[-1]:,}" if len(rows) > 1 else f"{rows[0]:,}"
        tokens = line.before(line.steps) * line.seq_len
        size = f" of {batch} rows of {line.seq_len:,} ({tokens:,} tokens)"
    last = schedule.at(line.steps - 1).lr
    return f"{line.steps:,} updates{size}, {config.warmup:,} of warmup, ends at {last:.4g} of the peak"


def _names() -> list[str]:
    return sorted(path.stem for path in (CONF / "schedule").glob("*.yaml"))


def _load(path: Path) -> DictConfig:
    """A file over those beside it that its ``defaults`` name, as Hydra has them."""
    values = OmegaConf.load(path)
    check(isinstance(values, DictConfig), "SCHEDULE", path, "a file of keys and values")
    assert isinstance(values, DictConfig), f"{path=}"
    bases = [base for base in values.pop("defaults", []) if base != "_self_"]
    merged = OmegaConf.merge({}, *(_load(path.with_name(f"{base}.yaml")) for base in bases), values)
    assert isinstance(merged, DictConfig), f"{path=}"
    return merged


def _train(name: str) -> dict[str, int]:
    """Sizes that ``conf/train`` has under a name, else those of its default."""
    own = CONF / "train" / f"{name}.yaml"
    values = _load(own if own.is_file() else own.with_name("default.yaml"))
    return {key: int(values[key]) for key in ("steps", "global_batch", "seq_len")}


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m trainer.schedule", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="SCHEDULE", help="files of conf/schedule; schedule.KEY=VALUE")
    parser.add_argument("--out", default="schedule.png", help="the picture (schedule.png)")
    parser.add_argument("--steps", type=int, help="updates; as long as published if not given")
    parser.add_argument("--global-batch", type=int, help="rows of an update")
    parser.add_argument("--seq-len", type=int, help="tokens of a row")
    return parser.parse_args(arguments)
