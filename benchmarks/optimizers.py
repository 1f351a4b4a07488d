"""One update of a small model by Muon and AdamW: ours beside torch's, in turns, and ours over two processes.

Usage: python -m benchmarks.optimizers [--variant dense,experts] [--rounds 5] [--threads 2]

Written to ``benchmarks/results/<date>_<machine>_optimizers.md``, with a subject of its own for part of the variants.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import commit, machine
from benchmarks.ours import model_config
from benchmarks.race import Spread
from benchmarks.shape import SHAPES, Shape
from benchmarks.updates import MUON, Contender, contenders, matrices_of, spread
from parallel.config_fit import Sizes
from parallel.mesh import lay_out
from planner.wire import Wire
from trainer import optim
from zoo.decoder import Decoder

LAYERS = {"dense": 8, "experts": 2}  # of experts a layer has 96 matrices
RANKS = 2
RESULTS = Path(__file__).parent / "results"
KINDS = {
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|_?linear)$|mkldnn",
    "AdamW": r"fused_adamw",
    "elementwise and norms": r"aten::(lerp_?|mul_?|add_?|div_?|norm|linalg_vector_norm|clamp.*)$",
    "copies": r"aten::(copy_|cat|stack|clone|_to_copy|contiguous|fill_|zero_)$",
}

READING = """\
One process holds all and takes their updates in turns, so that what disturbs the machine disturbs all alike; ratios are
taken within a round. Milliseconds are medians, in brackets the 10th and 90th percentile. Parameters, gradients and
moments are fp32, Newton-Schulz is in bf16. Gradients are drawn once; clipping is not in an update. Muon updates
matrices, and fused AdamW embedding, head and norms beside it, for torch's too.

Without instructions for bf16 products a CPU emulates them, as the last two rows show; what such a machine says of Muon
against AdamW holds for no machine that has them. Ours on two processes (FSDP2, one thread each) has one matrix
orthogonalised by one rank; bytes are those that leave rank 0 in an update."""


@dataclass(frozen=True)
class Shared:
    """Ours on several processes: seconds of each round, the slowest rank's; what rank 0 sends."""

    seconds: list[float]
    sent: dict[str, tuple[int, int]]


def main() -> None:
    """Run what the command line asks for, print it and write it."""
    options = _options()
    torch.set_num_threads(options.threads)
    started = os.getloadavg()[0]
    sections = [section(name, rounds=options.rounds, warmup=options.warmup) for name in options.variant]
    head = [
        "# One update by Muon and AdamW, ours and torch's",
        "",
        f"- command: `{shlex.join(['python', '-m', 'benchmarks.optimizers', *sys.argv[1:]])}`",
        f"- commit: {commit()}",
        f"- machine: {machine()}; {options.threads} threads; load over the last minute {started:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after",
        f"- versions: Python {sys.version.split()[0]}, torch {torch.__version__}",
        "",
        READING,
    ]
    text = "\n".join([*head, *sections]) + "\n"
    print(text)
    if not options.dry:
        RESULTS.mkdir(exist_ok=True)
        parts = ["optimizers", *(options.variant if len(options.variant) < len(SHAPES) else [])]
        (RESULTS / f"{datetime.date.today()}_{machine().slug}_{'-'.join(parts)}.md").write_text(text, encoding="utf-8")


def section(variant: str, *, rounds: int, warmup: int) -> str:
    """One model: times, whether both Muons agree, profiles."""
    shape = replace(SHAPES[variant], n_layers=LAYERS[variant])
    shared = _shared(shape, rounds=rounds, warmup=warmup)
    entries = contenders(shape)
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(warmup + rounds):
        for name, entry in entries.items():
            taken = _timed(entry.step)
            if turn >= warmup:
                seconds[name].append(taken)
        print(f"{variant} round {turn + 1}/{warmup + rounds}", file=sys.stderr, flush=True)
    ours, theirs = entries["our Muon"], entries["torch.optim.Muon"]
    equal = all(torch.equal(p, q) for p, q in zip(ours.parameters, theirs.parameters, strict=True))
    relation = "bitwise equal" if equal else "not equal"
    with torch.device("meta"):
        model = Decoder(model_config(shape))
    n_matrices = sum(len(of) for of in matrices_of(model).values())
    head = (
        f"{shape.n_layers} layers, {shape.n_parameters / 1e6:.1f} M parameters, {n_matrices} matrices; {rounds} "
        f"rounds after {warmup} of warm-up, after which parameters of both Muons are {relation}."
    )
    about = [f"- {name}: {entry.about}" for name, entry in entries.items()]
    lines = ["", f"## {variant}", "", head, "", *_table(seconds, shared), "", *_profiles(entries), "", *about]
    return "\n".join(lines)


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _table(seconds: dict[str, list[float]], shared: Shared) -> list[str]:
    """A row each, with its time over that of torch's Muon in the same round."""
    rows = ["| | ms an update | time over torch.optim.Muon |", "|---|---|---|"]
    reference = seconds["torch.optim.Muon"]
    for name, own in seconds.items():
        ratio = Spread.of([a / b for a, b in zip(own, reference, strict=True)])
        rows.append(f"| {name} | {_milliseconds(own)} | {ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f}) |")
    rows.append(f"| our Muon, {RANKS} processes (by itself) | {_milliseconds(shared.seconds)} | |")
    sent = "; ".join(f"{calls} {operation}, {size / 1e6:.1f} MB" for operation, (calls, size) in shared.sent.items())
    return [*rows, "", f"Over {RANKS} processes rank 0 sends: {sent}."]


def _milliseconds(seconds: list[float]) -> str:
    spread = Spread.of([1e3 * each for each in seconds])
    return f"{spread.median:,.0f} ({spread.low:,.0f}–{spread.high:,.0f})"


def _profiles(entries: dict[str, Contender]) -> list[str]:
    """Milliseconds of one update of each Muon by kind of operator."""
    names = ["our Muon", "torch.optim.Muon"]
    taken = {name: _profile(entries[name].step) for name in names}
    rows = ["Where the time goes: ms of one update under torch's profiler.", ""]
    rows += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind in [*KINDS, "other"]:
        cells = [f"{times[kind]:,.0f} ({times[kind] / sum(times.values()):.1%})" for times in taken.values()]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return rows


def _profile(step: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    total = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in seen.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        total[kind] += event.self_cpu_time_total / 1e3
    return total


def _shared(shape: Shape, *, rounds: int, warmup: int) -> Shared:
    """Ours under FSDP2 in processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, args=(folder, shape, rounds, warmup), nprocs=RANKS)
        found = json.loads((Path(folder) / "found").read_text())
    return Shared(found["seconds"], {key: (calls, size) for key, (calls, size) in found["sent"].items()})


def _rank(rank: int, folder: str, shape: Shape, rounds: int, warmup: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS)
    mesh = lay_out(Sizes(dp_replicate=1, dp_shard=RANKS), device=torch.device("cpu"), rank=rank)
    model = spread(shape, mesh)
    optimizer = optim.build(model, MUON, mesh=mesh)
    seconds, wire = [], Wire(mesh)
    for turn in range(warmup + rounds):
        dist.barrier()
        start = time.perf_counter()
        optimizer.step()
        dist.barrier()
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    with wire:
        optimizer.step()
    if rank == 0:
        sent = {line.operation: (line.calls, line.sent) for line in wire.lines.values()}
        (Path(folder) / "found").write_text(json.dumps({"seconds": seconds, "sent": sent}))
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", type=_variants, default=list(SHAPES), help="dense, experts or both (default)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--warmup", type=int, default=1, help="before them (1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (all cores)")
    parser.add_argument("--dry", action="store_true", help="print only, write no file")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: must be 2 or more")
    return options


def _variants(text: str) -> list[str]:
    for name in text.split(","):
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"{name}: must be one of {', '.join(SHAPES)}")
    return text.split(",")


if __name__ == "__main__":
    main()
