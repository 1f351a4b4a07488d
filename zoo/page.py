"""The first part of ``docs/zoo.md``, made of the cards."""

from pathlib import Path

from zoo import catalogue, describe
from zoo.card import Card, amount, brief, cards, first_source, gigaflops, kibibytes, kinds, published, sentences
from zoo.costs import SEQ_LEN, costs

END = "<!-- Above: written by `make docs` from conf/model/ and conf/cards.yaml. Below: by hand. -->"

OPENING = f"""\
# The zoo

Every architecture is a file in [conf/model/](../conf/model): its opening comment says what is unusual about it and
where it is published, its values are the published ones. `python -m zoo` shows this table, `python -m zoo NAME` a card
with every part counted, `--json` the same for programs.

Parameters are exact and leave multi-token modules out; active is what one token meets, embedding and head included.
Cache is keys and values of all layers in bf16, while no window bounds them. FLOPs are those of training, forward and
backward, for one token of a row of {SEQ_LEN:,}.
"""

CARDS = """\
## Cards
"""

UNPUBLISHED = """
## Unpublished

No dimensions, so no numbers. A name that ends in `_standin` trains an open architecture in the model's place, and says
so when it starts.
"""


def renew(path: Path) -> None:
    """Write the first part of the page anew; what stands below its end is kept.

    Raises:
        ValueError: the page has no line that ends its first part.
    """
    before, end, below = path.read_text("utf-8").partition(END)
    if not end:
        raise ValueError(f"{path}: must have the line {END}")
    path.write_text(first_part() + END + below, "utf-8")


def first_part() -> str:
    """A table of all, then a short card of each."""
    built = cards(catalogue.sizes())
    others = cards([*catalogue.without_dimensions(), *catalogue.stand_ins()])
    return "\n".join([OPENING, _table(built), CARDS, *map(_short, built), UNPUBLISHED, *map(_short, others), "", ""])


def _table(built: list[Card]) -> str:
    rows = [
        "| `model=` | parameters | active | cache/token | FLOPs/token | unusual | source |",
        "|---|--:|--:|--:|--:|---|---|",
    ]
    for one in built:
        assert one.config is not None, f"{one.name=}"
        c = costs(one.config)
        cells = [f"`{one.name}`", amount(c.parameters), amount(c.active), kibibytes(c.cache), gigaflops(c.flops)]
        rows.append(f"| {' | '.join([*cells, brief(one, limit=80), first_source(one)])} |")
    return "\n".join(rows) + "\n"


def _short(one: Card) -> str:
    text, c = one.text, one.config
    lines = [f"- **{text.name}**, `{one.name}`. {sentences(text.unusual)}"]
    if c is not None:
        lines.append(f"{describe.dimensions(c)}: {describe.pattern(c)}; {describe.around(c)}.")
        said = kinds(c)
        lines += [
            f"`{kind.strip()}` {mixer}; {work}." for (kind, mixer), (_, work) in zip(said[::2], said[1::2], strict=True)
        ]
    if one.published.total is not None or one.published.note is not None:
        lines.append(f"Published: {published(one.published)}")
    lines.append(sentences([text.source, *text.remarks]))
    return "\n  - ".join(lines).replace("*.", "\\*.")
