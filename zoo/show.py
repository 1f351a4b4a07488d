"""The zoo on a console: a table of all models, a card of one."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from zoo.card import Card, amount, brief, facts, first_source, gigaflops, kibibytes, training
from zoo.costs import SEQ_LEN, Costs, costs

WIDE = 130  # columns of a console that has room for a column of sources
MIDDLE = 95  # and for one of what is unusual
LABELS = 18  # columns of a card's headings
NOTES = (
    "parameters: without multi-token modules; active: what one token meets, embedding and head included; cache: keys"
    " and values of all layers, in bf16, while no window bounds them; FLOPs: of training, forward and backward, in a"
    f" row of {SEQ_LEN:,} tokens. python -m zoo NAME shows one in depth, --tiny adds the sizes for a CPU."
)


def show_table(cards: list[Card], console: Console) -> None:
    """Every model in a row, or in two where the console is narrow."""
    if console.width < MIDDLE:
        _stacked(cards, console)
    else:
        console.print(_table(cards, wide=console.width >= WIDE))
    console.print(Padding(NOTES, (1, 1, 0, 1)), style="dim")


def show_card(one: Card, console: Console) -> None:
    """One model in depth."""
    console.print(Text.assemble((one.text.name, "bold"), f"  model={one.name}"))
    for part in (_pairs(facts(one)), _costs(costs(one.config)) if one.config else None, _pairs(training(one))):
        if part is not None and part.row_count:
            console.print()
            console.print(part)


def _table(cards: list[Card], *, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True, show_edge=False)
    table.add_column("model=", no_wrap=True)
    for heading in ("parameters", "active", "cache\n/token", "training\nFLOPs/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unusual", ratio=1)
    if wide:
        table.add_column("source", max_width=32)
    for one in cards:
        if wide:
            table.add_row(one.name, *_numbers(one), _unusual(one, limit=100), first_source(one))
        else:
            table.add_row(
                one.name, *_numbers(one), _unusual(one, limit=60).append(f" ({first_source(one)})", style="dim")
            )
    return table


def _stacked(cards: list[Card], console: Console) -> None:
    """Numbers in one line, words below."""
    headings = ("model=", "parameters", "active", "cache/token", "training FLOPs/token")
    for row, one in [(headings, None), *(((each.name, *_numbers(each)), each) for each in cards)]:
        name, parameters, active, cache, flops = row
        console.print(f"{name:<20} {parameters:>11} {active:>7} {cache:>12} {flops:>20}", style="bold", no_wrap=True)
        if one is not None:
            words = _unusual(one, limit=100).append(f" ({first_source(one)})", style="dim")
            console.print(Padding(words, (0, 0, 0, 2)))


def _unusual(one: Card, *, limit: int) -> Text:
    return Text(f"{one.text.name}. " if one.config is None else "").append(brief(one, limit=limit))


def _numbers(one: Card) -> list[str]:
    if one.config is None:
        return ["unpublished", "", "", ""]
    c = costs(one.config)
    return [amount(c.parameters), amount(c.active), kibibytes(c.cache), gigaflops(c.flops)]


def _pairs(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim", min_width=LABELS)
    grid.add_column(overflow="fold")
    for label, said in rows:
        grid.add_row(label, Text(said))
    return grid


def _costs(c: Costs) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim", min_width=LABELS)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for part, count in c.parts:
        table.add_row(part, f"{count:,}", f"{count / c.parameters:.1%}")
    table.add_row("in all", f"{c.parameters:,}", "")
    if c.mtp:
        table.add_row(
            "beside them", f"{c.mtp:,}", "multi-token modules, without the embedding and head that they share"
        )
    if c.active != c.parameters:
        table.add_row("active", f"{c.active:,}", f"what one token meets; {c.active_without_embed:,} without embedding")
    table.add_row("cache", f"{c.cache:,}", f"bytes a token in bf16{_bounds(c)}")
    table.add_row("", f"{c.whole:,}", "bytes of a row as long as the context")
    table.add_row("FLOPs", f"{c.flops:,}", f"a token of a row of {SEQ_LEN:,}, training: forward and backward")
    table.add_row("", f"{c.flops // 3:,}", "forward alone")
    return table


def _bounds(c: Costs) -> str:
    if not c.kept:
        return ""
    return f"; {c.growing:,} in layers that see all, the others keep {c.kept / 2**20:,.1f} MiB at most"
