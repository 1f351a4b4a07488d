"""What a finished run achieved, from the files in its folder: ``python -m trainer.report RUN_DIR``."""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from yaml import YAMLError

from trainer.metrics import FILE, read

NEAR = 10  # updates at either end over which expert loads are averaged
STEP = re.compile(r"step-(\d{8,})(\.txt)?")


@dataclass(frozen=True)
class Report:
    """What is known of a run; None for what its files do not tell.

    Attributes:
        updates: how many there are in the metrics.
        first_loss: of the first update, nats a token.
        last_loss: of the last.
        validation: loss of the latest evaluation, nats a token.
        entropy: of the corpus's single tokens, nats a token: what knowing only their frequencies would reach.
        tokens_per_second: median over the updates.
        load_before: tokens of the fullest expert over the mean, averaged over the first updates.
        load_after: the same over the last updates.
        curve: picture of the losses.
        sample: latest text of the model.
        checkpoint: folder of the latest.
    """

    updates: int
    first_loss: float
    last_loss: float
    validation: float | None
    entropy: float | None
    tokens_per_second: float
    load_before: float | None
    load_after: float | None
    curve: Path | None
    sample: Path | None
    checkpoint: Path | None


def gather(run_dir: Path) -> Report:
    """Read a run's folder.

    Raises:
        ValueError: it holds no run, or a file in it is damaged.
    """
    rows = read(run_dir / FILE)
    if not rows:
        raise ValueError(f"{run_dir}: must be the folder of a run, with at least one update in {FILE}")
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    loads = [row["expert_load_max"] for row in rows if "expert_load_max" in row]
    curve = run_dir / "plots" / "loss.png"
    return Report(
        updates=len(rows),
        first_loss=rows[0]["loss"],
        last_loss=rows[-1]["loss"],
        validation=losses[-1] if losses else None,
        entropy=_entropy(run_dir),
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
        load_before=statistics.fmean(loads[:NEAR]) if loads else None,
        load_after=statistics.fmean(loads[-NEAR:]) if loads else None,
        curve=curve if curve.exists() else None,
        sample=_latest(run_dir / "samples"),
        checkpoint=_latest(run_dir / "checkpoints"),
    )


def show(report: Report, *, exported: Path | None, console: Console) -> None:
    """Print a report; ``exported`` is a Hugging Face folder made of the run."""
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts(report, exported=exported):
        table.add_row(name, Text(value))
    console.print(table)
    if report.sample:
        text = report.sample.read_text(encoding="utf-8", errors="replace").rstrip()
        console.print(Panel(Text(text), title=f"text sampled from the model, {report.sample.stem}", title_align="left"))


def facts(report: Report, *, exported: Path | None) -> list[tuple[str, str]]:
    """A report as names and values for people."""
    validation = "no evaluation was made"
    if report.validation is not None:
        validation = f"{report.validation:.3f} nats a token"
        if report.entropy is not None:
            gap = report.entropy - report.validation
            side = "below" if gap >= 0 else "above"
            validation += f", {abs(gap):.3f} {side} the corpus's unigram entropy of {report.entropy:.3f}"
    load = "no experts"
    if report.load_before is not None and report.load_after is not None:
        n = min(NEAR, report.updates)
        load = (
            f"fullest expert {report.load_before:.2f}x the mean in the first {n} updates, "
            f"{report.load_after:.2f}x in the last {n}"
        )
    return [
        ("training loss", f"{report.first_loss:.3f} to {report.last_loss:.3f} in {report.updates:,} updates"),
        ("validation loss", validation),
        ("speed", f"{report.tokens_per_second:,.0f} tokens/s, median of the updates"),
        ("expert load", load),
        ("loss curve", str(report.curve or "none was drawn")),
        ("sampled text", "below" if report.sample else "none was sampled"),
        ("checkpoint", str(report.checkpoint or "none was made")),
        ("Hugging Face folder", str(exported or "none was exported")),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: 0, or 2 with one line on standard error if the folders are not what they should be.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description="Show what a run achieved.")
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--exported", type=Path, help="Hugging Face folder that was made of it")
    options = parser.parse_args(arguments)
    try:
        if options.exported and not (options.exported / "config.json").is_file():
            raise ValueError(f"--exported={options.exported}: must be a Hugging Face folder, with a config.json")
        show(gather(options.run_dir), exported=options.exported, console=Console(highlight=False))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _entropy(run_dir: Path) -> float | None:
    """Unigram entropy of the corpus that the run's resolved config names, if its folder still lies there."""
    config = run_dir / "run.yaml"
    if not config.exists():
        return None
    try:
        folder = OmegaConf.select(OmegaConf.load(config), "data.folder")
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{config}: is damaged ({' '.join(str(error).split())})") from error
    manifest = Path(folder) / "manifest.json" if folder else None
    if manifest is None or not manifest.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(manifest.read_bytes())
        return float(content["unigram_entropy"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest}: must be a JSON object with a unigram_entropy") from error


def _latest(folder: Path) -> Path | None:
    """The ``step-…`` entry with the highest number."""
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP.fullmatch(path.name))]
    return max(found)[1] if found else None


if __name__ == "__main__":
    sys.exit(main())
