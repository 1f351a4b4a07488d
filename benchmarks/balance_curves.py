"""Balancing beside none on ``deepseek_v3_tiny``: loads of every layer and validation loss, seed by seed.

Usage: python -m benchmarks.balance_curves FOLDER [--workers 2]

Runs are kept in FOLDER; what is there is not run again. Results go to ``benchmarks/results`` and ``docs/pictures``.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

from benchmarks.curves_plot import Panel, draw
from benchmarks.machine import commit, machine
from benchmarks.trials import ROOT, Curve, Trial, run

ROUTER = "model.blocks.moe.moe.router"
NEITHER = (f"{ROUTER}.balance_rate=null", f"{ROUTER}.balance_loss=0")
KINDS = {
    "aux-free": ("schedule.balance_rate=[{until: 100, value: 1}, {until: 500, value: 0.1, shape: linear}]",),
    # One micro-batch, so that it is the global batch, without a forward to count ahead.
    "switch": (*NEITHER, f"{ROUTER}.switch_loss.weight=0.01", "train.micro_batch=32"),
    "none": NEITHER,
}
SEEDS = {"aux-free": (1, 2, 3), "switch": (1, 2, 3), "none": (1,)}
WORDS = (
    "experiment=demo", "train.steps=500", "train.seq_len=128", "train.global_batch=32", "train.micro_batch=16",
    "train.eval_every=50", "train.eval_rows=64", "train.sample_tokens=0", "log.experts=1",
)  # fmt: skip
LAST = 50  # updates whose loads count
LOAD = "expert_load_max/"
Found = dict[str, list[Curve]]


def study(folder: Path, *, workers: int) -> Found:
    """Curves of each kind, a seed after another."""
    trials = {
        (kind, seed): Trial(f"{kind}-{seed}", (*WORDS, *words, f"seed={seed}"))
        for kind, words in KINDS.items()
        for seed in SEEDS[kind]
    }
    curves = run(trials.values(), folder=folder, workers=workers)
    return {kind: [curves[trials[kind, seed].name] for seed in SEEDS[kind]] for kind in KINDS}


def loads(curve: Curve) -> dict[str, float]:
    """Fullest expert's load over the mean, of each layer, mean of the last updates."""
    rows = curve.rows[-LAST:]
    return {key.removeprefix(LOAD): statistics.mean(row[key] for row in rows) for key in rows[0] if LOAD in key}


def summary(found: Found) -> dict[str, object]:
    """What the study says, as plain values."""
    finals = {kind: [curve.final for curve in curves] for kind, curves in found.items()}
    return {
        "validation_loss": {
            kind: {
                "seeds": each,
                "mean": statistics.mean(each),
                "deviation": statistics.stdev(each) if len(each) > 1 else None,
            }
            for kind, each in finals.items()
        },
        "load_max_over_mean": {kind: [loads(curve) for curve in curves] for kind, curves in found.items()},
        "worst_layer": {kind: max(max(loads(curve).values()) for curve in curves) for kind, curves in found.items()},
        "validation": {kind: [curve.validation() for curve in curves] for kind, curves in found.items()},
    }


def picture(found: Found, path: Path) -> None:
    """Loads of the worst layer, smoothed, and validation losses."""
    worst = {kind: [_worst(curve) for curve in curves] for kind, curves in found.items()}
    losses = {kind: [c.validation() for c in curves] for kind, curves in found.items()}
    panels = [
        Panel("fullest expert of the worst layer", "load over mean, of 20 updates", worst, line=(1.25, "1.25")),
        Panel("each seed and their mean", "validation loss, nats", losses, limits=(4.25, 6.5)),
    ]
    draw(panels, path)


def _worst(curve: Curve, window: int = 20) -> tuple[list[float], list[float]]:
    """(updates, load over mean of the layer where it is largest), means of windows."""
    keys = [key for key in curve.rows[0] if LOAD in key]
    starts = range(0, len(curve.rows), window)
    means = [
        max(statistics.mean(r[key] for r in curve.rows[start : start + window]) for key in keys) for start in starts
    ]
    return [start + window / 2 for start in starts], means


def main() -> None:
    """Run the study, write and print what it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    found = study(options.folder.resolve(), workers=options.workers)
    kinds = {kind: list(words) for kind, words in KINDS.items()}
    facts = {"machine": str(machine()), "commit": commit(), "words": WORDS, "kinds": kinds, **summary(found)}
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_{machine().slug}_balance-curves.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    picture(found, ROOT / "docs" / "pictures" / "balance_curves.png")
    print(json.dumps({key: value for key, value in facts.items() if key != "validation"}, indent=1))


if __name__ == "__main__":
    main()
