"""Muon beside AdamW on the demo's model and corpus: the same grid of learning rates and the same budget for both.

Usage: python -m benchmarks.muon_curves FOLDER [--workers 2]

Each optimizer is tuned on one seed over the grid; its best learning rate runs on two seeds more. Runs are kept in
FOLDER; what is there is not run again. Results go to ``benchmarks/results`` and ``docs/pictures``.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

from benchmarks.curves_plot import Panel, draw
from benchmarks.machine import commit, machine
from benchmarks.trials import ROOT, Curve, Trial, run

KINDS = ("adamw", "muon")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TUNED_ON, FURTHER = 1, (2, 3)
WORDS = ("experiment=demo", "train.eval_every=10", "train.sample_tokens=0")
Found = dict[str, dict[float, list[Curve]]]


def trial(kind: str, rate: float, seed: int) -> Trial:
    """One run of the study."""
    return Trial(f"{kind}-{rate:g}-{seed}", (*WORDS, f"optim={kind}", f"optim.lr={rate:g}", f"seed={seed}"))


def study(folder: Path, *, workers: int) -> Found:
    """Curves by optimizer and learning rate: the tuning seed's first, of the best rate then all others."""
    tuning = {(kind, rate): trial(kind, rate, TUNED_ON) for rate in RATES for kind in KINDS}
    curves = run(tuning.values(), folder=folder, workers=workers)
    found = {kind: {rate: [curves[tuning[kind, rate].name]] for rate in RATES} for kind in KINDS}
    chosen = {kind: best(found[kind]) for kind in KINDS}
    again = {kind: [trial(kind, chosen[kind], seed) for seed in FURTHER] for kind in KINDS}
    curves = run([each for pair in zip(*again.values(), strict=True) for each in pair], folder=folder, workers=workers)
    for kind in KINDS:
        found[kind][chosen[kind]] += [curves[each.name] for each in again[kind]]
    return found


def best(rates: dict[float, list[Curve]]) -> float:
    """The learning rate with the least validation loss on the tuning seed."""
    return min(rates, key=lambda rate: rates[rate][0].final)


def summary(found: Found) -> dict[str, object]:
    """What the study says, as plain values."""
    chosen = {kind: found[kind][best(found[kind])] for kind in KINDS}
    pairs = list(zip(chosen["adamw"], chosen["muon"], strict=True))
    return {
        "grid": {kind: {f"{rate:g}": curves[0].final for rate, curves in found[kind].items()} for kind in KINDS},
        "best": {kind: best(found[kind]) for kind in KINDS},
        "final": {kind: [curve.final for curve in chosen[kind]] for kind in KINDS},
        "updates": len(chosen["adamw"][0].rows),
        "muon_reaches_adamw_after": [muon.reaches(adamw.final) for adamw, muon in pairs],
        "validation": {kind: [curve.validation() for curve in chosen[kind]] for kind in KINDS},
    }


def picture(found: Found, path: Path) -> None:
    """The curves of both at their best learning rates, and the grids."""
    chosen = {kind: best(found[kind]) for kind in KINDS}
    curves = {f"{kind}, lr {chosen[kind]:g}": [c.validation() for c in found[kind][chosen[kind]]] for kind in KINDS}
    level = statistics.mean(curve.final for curve in found["adamw"][chosen["adamw"]])
    main = Panel("three seeds each", "validation loss, nats", curves, line=(level, "adamw's last"), limits=(4.25, 6.5))
    grid = {f"{kind}, lr {rate:g}": [found[kind][rate][0].validation()] for kind in KINDS for rate in RATES}
    draw([main, Panel("the grid, one seed", "validation loss, nats", grid, limits=(4.25, 6.5))], path)


def main() -> None:
    """Run the study, write and print what it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    found = study(options.folder.resolve(), workers=options.workers)
    facts = {"machine": str(machine()), "commit": commit(), "words": WORDS, **summary(found)}
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_{machine().slug}_muon-curves.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    picture(found, ROOT / "docs" / "pictures" / "muon_curves.png")
    print(json.dumps({key: value for key, value in facts.items() if key != "validation"}, indent=1))


if __name__ == "__main__":
    main()
