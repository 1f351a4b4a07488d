"""What ``python -m zoo`` says of one model: its facts in words, its costs in numbers."""

import re
from dataclasses import dataclass

from zoo import catalogue, describe
from zoo.catalogue import Published, Text
from zoo.config import ModelConfig
from zoo.costs import SEQ_LEN, costs
from zoo.count import parameters


@dataclass(frozen=True)
class Card:
    """A model of the zoo.

    Attributes:
        name: what ``model=`` takes.
        text: what its file says of it.
        config: None where the dimensions are unpublished.
        published: the publisher's figures.
        stand_in: the architecture that ``model=`` trains in its place, of those that are not its own.
    """

    name: str
    text: Text
    config: ModelConfig | None
    published: Published
    stand_in: str | None = None


def card(name: str) -> Card:
    """The card of a model of the zoo."""
    text, published = catalogue.text(name), catalogue.published(name)
    if name in catalogue.without_dimensions():
        return Card(name, text, None, published)
    if name in catalogue.stand_ins():
        return Card(name, text, None, published, stand_in=catalogue.parent(name))
    return Card(name, text, catalogue.load(name), published)


def cards(names: list[str]) -> list[Card]:
    """Cards, each series together and from small to large."""

    def key(one: Card) -> tuple[str, int]:
        return re.split("_|_tiny$", one.name)[0], parameters(one.config).total if one.config else 0

    return sorted(map(card, names), key=key)


def numbers(one: Card) -> dict[str, str | int | None]:
    """A card for programs; numbers that are unpublished are None."""
    c = costs(one.config) if one.config else None
    return {
        "name": one.name,
        "model": one.text.name,
        "parameters": c.parameters if c else None,
        "active_parameters": c.active if c else None,
        "mtp_parameters": c.mtp if c else None,
        "kv_bytes_per_token": c.cache if c else None,
        "flops_per_token": c.flops if c else None,
        "flops_seq_len": SEQ_LEN,
        "stand_in": one.stand_in,
        "unusual": sentences(one.text.unusual),
        "source": one.text.source,
    }


def facts(one: Card) -> list[tuple[str, str]]:
    """A card in words: what is said, under what heading."""
    text, c = one.text, one.config
    rows = [("unusual", sentences(text.unusual))]
    if one.stand_in is not None:
        rows.append(("trains", f"{one.stand_in}: python -m zoo {one.stand_in}"))
    if c is not None:
        rows.append(("dimensions", describe.dimensions(c)))
        rows.append(("layers", describe.pattern(c)))
        rows += kinds(c)
        rows.append(("norms", f"{describe.norm(c.norm)}; {_placements(c)}"))
        rows.append(("embedding, head", describe.around(c)))
    rows.append(("source", sentences([text.source])))
    if text.remarks:
        rows.append(("remarks", sentences(text.remarks)))
    if one.published.total is not None or one.published.note is not None:
        rows.append(("published", published(one.published)))
    return rows


def kinds(config: ModelConfig) -> list[tuple[str, str]]:
    """Two lines for each kind of layer; a mixer like that of a kind before is not said twice."""
    rows: list[tuple[str, str]] = []
    mixers: dict[str, str] = {}
    for kind, layer in config.blocks.items():
        said = describe.mixer(layer)
        like = next((other for other, mixer in mixers.items() if mixer == said), None)
        mixers[kind] = said
        rows += [(f"  {kind}", f"mixes as {like} does" if like else said), ("", describe.feed_forward(layer))]
    return rows


def training(one: Card) -> list[tuple[str, str]]:
    """Commands that train it, or what there is in its place."""
    if one.config is None and one.stand_in is None:
        return []
    rows = []
    tiny = one.name if one.name.endswith(catalogue.TINY) else catalogue.tiny_of(one.name)
    if tiny:
        rows.append(("train on a CPU", f"python train.py model={tiny} data=stdlib"))
    if tiny != one.name:
        command = "torchrun --nproc-per-node 8 train.py"
        rows.append(("train", f"{command} model={one.name} data=shards data.folder=FOLDER precision=bf16"))
    if one.stand_in:
        rows[-1] = (f"train {one.stand_in}", rows[-1][1])
    return rows


def published(given: Published) -> str:
    """The publisher's figures in words."""
    parts = [f"{given.total:,g}B parameters"] if given.total is not None else []
    parts += [f"{given.active:g}B active"] if given.active is not None else []
    said = ", ".join(parts)
    return sentences([each for each in (said, given.note) if each])


def brief(one: Card, *, limit: int) -> str:
    """The first clauses of what is unusual, about ``limit`` characters of them."""
    whole = ". ".join(one.text.unusual)
    clauses = re.split(r"(?<=[;:,.])\s", whole)
    said = clauses[0]
    for clause in clauses[1:]:
        if len(said) + len(clause) >= limit:
            break
        said += f" {clause}"
    return said if said == whole else said.rstrip(";:,.") + (" …" if said[-1] in ":," else "")


def first_source(one: Card) -> str:
    """Where to look first."""
    found = re.search(r"arXiv [\d.]*\d|(github|huggingface) [\w.-]+/[\w.-]*\w", one.text.source)
    return found[0] if found else one.text.source.partition(",")[0]


def sentences(parts: list[str]) -> str:
    """Sentences in a row, each with its full stop."""
    return " ".join(f"{each}." for each in parts)


def amount(count: int) -> str:
    """A number of parameters, in millions or billions."""
    return (
        f"{count / 1e6:,.0f}M"
        if count < 9.995e8
        else f"{count / 1e9:,.2f}B"
        if count < 1e10
        else f"{count / 1e9:,.1f}B"
    )


def kibibytes(count: int) -> str:
    """Bytes of a token's cache."""
    return f"{count / 1024:,.1f} KiB"


def gigaflops(count: int) -> str:
    """Floating-point operations for a token."""
    return f"{count / 1e9:,.0f} G" if count >= 1e11 else f"{count / 1e9:,.1f} G"


def _placements(config: ModelConfig) -> str:
    kinds = {kind: describe.placement(layer) for kind, layer in config.blocks.items()}
    if len(set(kinds.values())) == 1:
        return next(iter(kinds.values()))
    return ", ".join(f"{kind}: {said}" for kind, said in kinds.items())
