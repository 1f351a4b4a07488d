"""The zoo on a console: a table of all models, a card of one; a narrow console wraps them, nothing is left out."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from zoo.card import Card, amount, brief, facts, first_source, gigaflops, kibibytes, training
from zoo.costs import SEQ_LEN, Costs, costs

WIDE = 130  # columns of a console that has room for a column of sources
MIDDLE = 95  # and for one of what is unusual
CARD = 60  # and for the columns of a card
UNKNOWN = 80  # columns of a console that does not say how many it has
LABELS = 18  # columns of a card's headings
HEADINGS = ["parameters", "active", "cache/token", "training FLOPs/token"]
NOTES = (
    "parameters: without multi-token modules; active: what one token meets, embedding and head included; cache: keys"
    " and values of all layers, in bf16, while no window bounds them; FLOPs: of training, forward and backward, in a"
    f" row of {SEQ_LEN:,} tokens. python -m zoo NAME shows one in depth, --tiny adds the sizes for a CPU."
)


class Screen(Console):
    """The console; a reader that goes away, as ``head`` does, is the caller's to handle and no exit."""

    def __init__(self) -> None:
        super().__init__(highlight=False)
        self.width = self.width or UNKNOWN  # nothing at all is shown on no columns

    def on_broken_pipe(self) -> None:
        """Let the error pass."""
        raise  # rich calls this where it has caught it


def show_table(cards: list[Card], console: Console) -> None:
    """Every model in a row, in a row and words below it, or in a line for each number: what the width has room for."""
    rows = [["model=", *HEADINGS], *([one.name, *_numbers(one)] for one in cards)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fits = sum(widths) + len(widths) - 1 <= console.width
    if console.width >= MIDDLE:
        console.print(_table(cards, wide=console.width >= WIDE))
    elif fits:
        _stacked(rows, widths, cards, console)
    else:
        _lines(cards, console)
    console.print(Padding(NOTES, (1, 1, 0, 1) if fits else (1, 0, 0, 0)), style="dim")


def show_card(one: Card, console: Console) -> None:
    """One model in depth."""
    console.print(Text.assemble((one.text.name, "bold"), f"  model={one.name}"))
    parts: list[Sequence[tuple[str, ...]]] = [
        facts(one),
        _costs(costs(one.config)) if one.config else [],
        training(one),
    ]
    for rows in filter(None, parts):
        console.print()
        if console.width >= CARD:
            console.print(_grid(rows))
        else:
            for label, *said in rows:
                _line(label.strip(), " ".join(filter(None, said)), console)


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


def _stacked(rows: list[list[str]], widths: list[int], cards: list[Card], console: Console) -> None:
    """Numbers in one line, words below."""
    for row, one in zip(rows, [None, *cards], strict=True):
        cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))]
        console.print(" ".join(cells), style="bold")
        if one is not None:
            console.print(Padding(_words(one), (0, 0, 0, 2)))


def _lines(cards: list[Card], console: Console) -> None:
    """Each number in a line of its own."""
    for one in cards:
        console.print(Text(one.name, style="bold"))
        for heading, number in zip(HEADINGS, _numbers(one), strict=True):
            if number:
                _line(heading, number, console)
        console.print(_words(one))
        console.print()


def _line(label: str, said: str, console: Console) -> None:
    console.print(Text.assemble((label, "dim"), " " if label else "", said))


def _words(one: Card) -> Text:
    return _unusual(one, limit=100).append(f" ({first_source(one)})", style="dim")


def _unusual(one: Card, *, limit: int) -> Text:
    return Text(f"{one.text.name}. " if one.config is None else "").append(brief(one, limit=limit))


def _numbers(one: Card) -> list[str]:
    if one.config is None:
        return ["unpublished", "", "", ""]
    c = costs(one.config)
    return [amount(c.parameters), amount(c.active), kibibytes(c.cache), gigaflops(c.flops)]


def _grid(rows: Sequence[tuple[str, ...]]) -> Table:
    """A card's headings, numbers if the rows have three parts, and words."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim", min_width=LABELS)
    if len(rows[0]) == 3:
        grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _costs(c: Costs) -> list[tuple[str, str, str]]:
    """What, how much, and in words."""
    rows = [(part, f"{count:,}", f"{count / c.parameters:.1%}") for part, count in c.parts]
    rows.append(("in all", f"{c.parameters:,}", ""))
    if c.mtp:
        rows.append(
            ("beside them", f"{c.mtp:,}", "multi-token modules, without the embedding and head that they share")
        )
    if c.active != c.parameters:
        rows.append(("active", f"{c.active:,}", f"what one token meets; {c.active_without_embed:,} without embedding"))
    rows.append(("cache", f"{c.cache:,}", f"bytes a token in bf16{_bounds(c)}"))
    rows.append(("", f"{c.whole:,}", "bytes of a row as long as the context"))
    rows.append(("FLOPs", f"{c.flops:,}", f"a token of a row of {SEQ_LEN:,}, training: forward and backward"))
    rows.append(("", f"{c.flops // 3:,}", "forward alone"))
    return rows


def _bounds(c: Costs) -> str:
    if not c.kept:
        return ""
    return f"; {c.growing:,} in layers that see all, the others keep {c.kept / 2**20:,.1f} MiB at most"
