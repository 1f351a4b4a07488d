"""Steps of all implementations in turns, so that whatever disturbs the machine disturbs all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from benchmarks.breakdown import breakdown
from benchmarks.contender import Contender
from benchmarks.field import Entry
from benchmarks.limit import Limit
from benchmarks.memory import peak
from benchmarks.shape import SHAPES, Shape

PROFILES = 3  # of each, in turns; the shortest is shown, since the profiler sees whatever disturbs it


@dataclass(frozen=True)
class Heat:
    """One model in one dtype.

    Attributes:
        dtype: fp32 or bf16.
        variant: dense or experts.
        entries: who takes part.
        warmup: rounds that do not count.
        steps: rounds that do.
        rows: of 512 tokens, in one step.
    """

    dtype: str
    variant: str
    entries: Sequence[Entry]
    warmup: int
    steps: int
    rows: int

    @property
    def shape(self) -> Shape:
        """What is trained."""
        return replace(SHAPES[self.variant], rows=self.rows)


@dataclass
class Lane:
    """What was measured of one implementation: seconds and losses of each round, peak GB, milliseconds by kind."""

    about: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: float | None = None
    kinds: dict[str, float] | None = None


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of two values or more."""
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])


@dataclass(frozen=True)
class Result:
    """A heat with its lanes by name; ``limit`` holds the seconds of the bare products, round by round."""

    heat: Heat
    limit: list[float]
    flops: int
    lanes: dict[str, Lane]

    def share(self, name: str) -> Spread:
        """Time of the bare products over time of the step, paired by round."""
        return Spread.of([bare / own for bare, own in zip(self.limit, self.lanes[name].seconds, strict=True)])

    def speed(self, name: str) -> Spread:
        """Tokens a second."""
        tokens = self.heat.shape.n_tokens
        return Spread.of([tokens / own for own in self.lanes[name].seconds])

    def against(self, name: str, other: str) -> Spread:
        """Speed of ``name`` over that of ``other``, paired by round."""
        pairs = zip(self.lanes[name].seconds, self.lanes[other].seconds, strict=True)
        return Spread.of([theirs / own for own, theirs in pairs])


def run(heat: Heat, *, profile: bool, memory: bool, say: Callable[[str], None]) -> Result:
    """Measure: first the memory of each alone, then all in turns, then their profiles.

    Args:
        heat: what and who.
        profile: whether to take profiles.
        memory: whether to measure memory.
        say: is told what is going on.
    """
    shape = heat.shape
    lanes = {entry.name: Lane(about="") for entry in heat.entries}
    if memory:
        for name, lane in lanes.items():
            lane.memory = peak(name, dtype=heat.dtype, variant=heat.variant, rows=heat.shape.rows)
            say(f"{heat.variant} {heat.dtype} {name}: peak {lane.memory:.2f} GB")
    limit = Limit(shape, dtype=torch.float32 if heat.dtype == "fp32" else torch.bfloat16)
    contenders = {entry.name: entry.build(shape) for entry in heat.entries}
    for name, contender in contenders.items():
        lanes[name].about = contender.about
    bare: list[float] = []
    for turn in range(heat.warmup + heat.steps):
        line = _round(limit, contenders, lanes, bare, counts=turn >= heat.warmup, seed=turn, heat=heat)
        say(f"{heat.variant} {heat.dtype} round {turn + 1}/{heat.warmup + heat.steps}: {line}")
    if profile:
        tokens = torch.randint(0, shape.vocab_size, (2, shape.rows, shape.seq_len))
        for _ in range(PROFILES):
            for name, contender in contenders.items():
                lane, taken = lanes[name], breakdown(partial(contender.gradients, *tokens), contender.update)
                lane.kinds = min((lane.kinds or taken, taken), key=lambda kinds: sum(kinds.values()))
    return Result(heat, bare, limit.flops, lanes)


def _round(
    limit: Limit,
    contenders: dict[str, Contender],
    lanes: dict[str, Lane],
    bare: list[float],
    *,
    counts: bool,
    seed: int,
    heat: Heat,
) -> str:
    """The bare products, then one step of each on the same tokens."""
    shape = heat.shape
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, shape.vocab_size, (2, shape.rows, shape.seq_len), generator=generator)
    gc.collect()
    start = time.perf_counter()
    limit()
    seconds = time.perf_counter() - start
    told = [f"limit {seconds:.2f}"]
    if counts:
        bare.append(seconds)
    for name, contender in contenders.items():
        start = time.perf_counter()
        loss = contender.gradients(tokens, targets)
        contender.update()
        seconds = time.perf_counter() - start
        told.append(f"{name} {seconds:.2f}")
        if counts:
            lanes[name].seconds.append(seconds)
            lanes[name].losses.append(loss)
    return ", ".join(told) + " s"
