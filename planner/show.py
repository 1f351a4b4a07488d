"""A dry run's report on a console."""

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from planner.report import GIB, RESIDENT, Report

BAR = 16  # columns of what is most


def show(report: Report, console: Console) -> None:
    """Say what was built, what it takes and what it sends."""
    rows, length = report.tokens
    console.print(
        Text(f"Dry run of rank {report.rank} of {report.sizes.ranks:,} on {report.hardware.name}", style="bold")
    )
    console.print(report.title.replace("; ", "\n"), highlight=False)
    batches = f"{report.micro_batches} micro-batch{'es' if report.micro_batches > 1 else ''}"
    tokens = rows * length * report.micro_batches * report.sizes.dp
    console.print(f"{batches} of {rows} x {length:,} tokens on this rank, {tokens:,} tokens an update", highlight=False)
    console.print()
    console.print(_memory(report))
    console.print(_verdict(report))
    if report.collectives:
        console.print()
        console.print(_collectives(report))
    remarks = [*report.remarks, f"traced in {report.seconds:.0f} s"]
    console.print(Padding("; ".join(remarks), (1, 0, 0, 0)), style="dim", highlight=False)


def size(number: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number:,} B"


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", no_wrap=True)
    return table


def _memory(report: Report) -> Group:
    """At rest and at the peak, with a bar for each part of it."""
    m = report.memory
    table = _table(("memory of this rank", "left"), ("at rest", "right"), ("at the peak", "right"), ("", "left"))
    rest = {
        "parameters": m.parameters,
        "gradients": m.gradients,
        "optimizer state": m.optimizer,
        "buffers": m.buffers,
    }
    shown = {label: m.at_peak.get(label, 0) for label in RESIDENT} | m.at_peak
    for label, there in shown.items():
        if rest.get(label, 0) or there:
            at_rest = size(rest[label]) if rest.get(label) else ""
            table.add_row(label, at_rest, size(there), Text(_bar(there, m.peak), style="cyan"))
    table.add_section()
    table.add_row("all, in the " + m.phase, "", size(m.peak), "", style="bold")
    parts: list[Table | Text] = [table]
    if m.offloaded:
        parts.append(Text(f"in the memory of the host: {size(m.parameters + m.gradients + m.optimizer)}"))
    return Group(*parts)


def _bar(number: int, of: int) -> str:
    """As many of 16 columns, in eighths of one.

    Example: 5 of 64 are 1¼ columns, █▎.
    """
    eighths = min(round(number / of * BAR * 8), BAR * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _verdict(report: Report) -> Text:
    h, share = report.hardware, report.needed / report.available
    reserve = f"{size(report.memory.peak)} + {h.reserve_gib:.1f} GiB for what is no tensor"
    if share > 1:
        return Text(f"does not fit: {reserve} is {share:.0%} of {h.memory_gib:,.1f} GiB", style="bold red")
    return Text(f"fits: {reserve} is {share:.0%} of {h.memory_gib:,.1f} GiB", style="bold green")


def _collectives(report: Report) -> Table:
    table = _table(
        ("sent in an update", "left"),
        ("ranks", "right"),
        ("", "left"),
        ("calls", "right"),
        ("bytes", "right"),
        ("at link speed", "right"),
    )
    before = ""
    for line in sorted(report.collectives, key=lambda line: (_order(line.axis), -line.sent)):
        first, before = line.axis != before, line.axis
        link = "node" if report.near(line) else "network"
        table.add_row(
            line.axis if first else "",
            f"{line.ranks:,}" if first else "",
            line.operation,
            f"{line.calls:,}",
            size(line.sent),
            f"{report.at_link_speed(line):,.3f} s {link}",
        )
    return table


def _order(axis: str) -> tuple[int, str]:
    """Innermost first: those talk most."""
    inner = ("tp", "tp_copy", "cp", "ep", "edp", "dp_shard", "fsdp", "dp_replicate", "pp")
    first = axis.partition(" = ")[0]
    return inner.index(first) if first in inner else len(inner), axis
