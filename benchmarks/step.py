"""One training step of a small model: ours beside transformers, litgpt and torchtitan, and the machine's limit.

Usage: python -m benchmarks.step [--dtype bf16] [--variant dense] [--only ours,torchtitan] [--steps 12]

Without options the whole matrix is run (fp32 and bf16, dense and experts, everybody) and written to
``benchmarks/results/<date>_<machine>_step.md``. With options the name says which part it is. What is not installed is
named with the line that installs it, and left out only by ``--only``.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.field import Entry, entries
from benchmarks.machine import commit, machine
from benchmarks.race import Heat, run
from benchmarks.report import report
from benchmarks.shape import SHAPES

DTYPES = ("fp32", "bf16")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run what the command line asks for, print it and write it."""
    options = _options()
    torch.set_num_threads(options.threads)
    heats = [
        Heat(dtype, variant, chosen(dtype, options.only), warmup=options.warmup, steps=options.steps, rows=options.rows)
        for dtype in options.dtype
        for variant in options.variant
    ]
    say = _say if not options.quiet else _nothing
    extras = {"profile": "profile" not in options.skip, "memory": "memory" not in options.skip}
    results = [run(heat, **extras, say=say) for heat in heats if heat.entries]
    command = shlex.join(["python", "-m", "benchmarks.step", *sys.argv[1:]])
    text = report(results, command=command, machine=str(machine()), commit=commit(), versions=_versions())
    print(text)
    if not options.dry:
        path = RESULTS / f"{datetime.date.today()}_{machine().slug}_{_subject(options)}.md"
        RESULTS.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def chosen(dtype: str, only: list[str]) -> list[Entry]:
    """Who takes part in ``dtype``; everybody where ``only`` is empty."""
    return [entry for entry in entries(dtype) if not only or entry.name in only]


def _options() -> argparse.Namespace:
    known = sorted({entry.name for dtype in DTYPES for entry in entries(dtype)})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", type=_listed(DTYPES), default=list(DTYPES), help="fp32, bf16 or both (default)")
    parser.add_argument(
        "--variant", type=_listed(SHAPES), default=list(SHAPES), help="dense, experts or both (default)"
    )
    parser.add_argument("--only", type=_listed(known), default=[], help=f"who takes part, of {', '.join(known)}")
    parser.add_argument("--steps", type=int, default=12, help="rounds that count (12)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (2)")
    parser.add_argument("--rows", type=int, default=8, help="rows of 512 tokens in one step (8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (all cores)")
    parser.add_argument("--skip", type=_listed(("memory", "profile")), default=[], help="memory, profile")
    parser.add_argument("--quiet", action="store_true", help="no line for each round on stderr")
    parser.add_argument("--dry", action="store_true", help="print only, write no file")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: must be 2 or more")
    return options


def _listed(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names out of ``allowed``."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name}: must be one of {', '.join(allowed)}")
        return names

    return parse


def _subject(options: argparse.Namespace) -> str:
    """``step`` for the whole matrix, else with the part that was run."""
    parts = [options.dtype if len(options.dtype) == 1 else [], options.variant if len(options.variant) == 1 else []]
    named = [name.replace(":", "-") for part in [*parts, options.only] for name in part]
    return "-".join(["step", *named])


def _versions() -> str:
    found = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    for name in ("transformers", "litgpt", "torchtitan"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _nothing(line: str) -> None:
    del line


if __name__ == "__main__":
    main()
