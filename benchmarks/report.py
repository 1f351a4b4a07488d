"""Results of ``benchmarks/step.py`` as Markdown."""

from collections.abc import Sequence

from benchmarks.race import Result, Spread

READING = """\
One process holds all implementations and takes their steps in turns (limit, first, second, … limit, first, …), so that
what disturbs the machine disturbs all alike; shares and ratios are taken within a round. Shown are the median and, in
brackets, the 10th and 90th percentile. A step is forward, loss, backward, clipping to norm 1 and fused AdamW, eager, on
rows of 512 random tokens, one document a row, the same tokens for all.

The limit is the time of every product of a linear map of the step, forward and both backward ones, as bare `torch.mm`
of the same shapes and dtype into memory that exists, operands in cache; for experts as if the tokens spread evenly.
Attention's own products are not in it. The share of the limit is that time over the step's.

Peak memory is what resident memory grew by, at its peak in two steps, in a process that held only this implementation.

bf16: ours, and the peers named without `:pure`, keep weights, gradients and moments in fp32 (the peers by
`torch.autocast`, as their own trainers do on one device). Peers named `:pure` keep everything in bf16: cheaper, and
another training; they are there so that nobody is shown slower than it can be. On an x86 CPU without bf16 instructions
ours multiplies bf16 numbers in fp32 (`zoo/linear.py:product_dtype`) and the peers and the limit do not: its share of
the limit is then above one, and the figures say nothing of a machine that has such instructions."""


def report(results: Sequence[Result], *, command: str, machine: str, commit: str, versions: str) -> str:
    """The whole file."""
    head = [
        "# One training step, ours and three others",
        f"- command: `{command}`",
        f"- commit: {commit}",
        f"- machine: {machine}",
        f"- versions: {versions}",
    ]
    return "\n".join([*head[:1], "", *head[1:], "", READING, *(section(result) for result in results)]) + "\n"


def section(result: Result) -> str:
    """One model in one dtype: speeds, then profiles, then what exactly ran."""
    heat = result.heat
    rate = Spread.of([result.flops / seconds / 1e9 for seconds in result.limit])
    lines = [
        "",
        f"## {heat.variant}, {heat.dtype}",
        "",
        f"{heat.shape.n_parameters / 1e6:.1f} M parameters; {heat.rows} rows of 512 tokens; {heat.steps} rounds after "
        f"{heat.warmup} of warm-up. Limit: {_spread(Spread.of(result.limit), 3)} s a step, {_spread(rate, 0)} GFLOP/s.",
        "",
        *speeds(result),
        "",
        *profiles(result),
        *(f"- {name}: {lane.about}" for name, lane in result.lanes.items()),
    ]
    return "\n".join(lines)


def speeds(result: Result) -> list[str]:
    """A row for each implementation, and how ours stands to the fastest of the others."""
    peers = [name for name in result.lanes if name != "ours"]
    best = max(peers, key=lambda name: result.speed(name).median, default=None)
    last = "" if best is None else f" speed over {best} |"
    rows = [f"| | tokens/s | share of the limit |{last} peak memory, GB | loss, first to last |"]
    rows.append("|---|---|---|" + "---|" * (2 if best is None else 3))
    for name, lane in result.lanes.items():
        ratio = "" if best is None else f" {_spread(result.against(name, best), 3)} |"
        memory = "not measured" if lane.memory is None else f"{lane.memory:.2f}"
        rows.append(
            f"| {name} | {_spread(result.speed(name), 0)} | {_spread(result.share(name), 3)} |{ratio} {memory} "
            f"| {lane.losses[0]:.3f} to {lane.losses[-1]:.3f} |"
        )
    return rows


def profiles(result: Result) -> list[str]:
    """Milliseconds of one profiled step by kind of operator, with its part of that step in percent."""
    taken = {name: lane.kinds for name, lane in result.lanes.items() if lane.kinds is not None}
    if not taken:
        return []
    kinds = list(next(iter(taken.values())))
    rows = [
        "Where the time goes: ms of a step under torch's profiler, the shortest of three, and percent of it.",
        "",
    ]
    rows += ["| | " + " | ".join(taken) + " |", "|---|" + "---|" * len(taken)]
    for kind in kinds:
        cells = [f"{times[kind]:.0f} ({times[kind] / sum(times.values()):.0%})" for times in taken.values()]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return [*rows, ""]


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:,.{digits}f} ({spread.low:,.{digits}f}–{spread.high:,.{digits}f})"
