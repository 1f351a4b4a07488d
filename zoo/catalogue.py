"""The shipped architectures as files: which there are, what their opening comments say, the config each makes."""

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from zoo.config import ModelConfig

CONF = Path(__file__).parents[1] / "conf"
MODELS = CONF / "model"
CARDS = CONF / "cards.yaml"
TINY, STAND_IN = "_tiny", "_standin"
SENTENCE = re.compile(r"(?<!\bal)\.(?:\s+|$)")  # "et al. 2019" goes on
SOURCE = re.compile(r"arXiv \d|\bgithub |\bhuggingface |^No (paper|source)|System Card")


@dataclass(frozen=True)
class Text:
    """What the comment that opens a file says.

    Attributes:
        name: the model's, from the first sentence.
        unusual: sentences up to the sources.
        source: the sentence that names where it is published.
        remarks: sentences after it.
    """

    name: str
    unusual: list[str]
    source: str
    remarks: list[str]


@dataclass(frozen=True)
class Published:
    """Figures of the publisher in billions, None where there is none, and why ours may differ from them."""

    total: float | None
    active: float | None
    note: str | None


def sizes() -> list[str]:
    """Architectures with published dimensions, one file each."""
    return [name for name in _files() if not name.endswith((TINY, STAND_IN))]


def tiny_ones() -> list[str]:
    """The sizes for a CPU."""
    return [name for name in _files() if name.endswith(TINY)]


def stand_ins() -> list[str]:
    """Open architectures under the name of an unpublished one."""
    return [name for name in _files() if name.endswith(STAND_IN)]


def without_dimensions() -> list[str]:
    """Models that have a card and no file: their dimensions are unpublished."""
    return sorted(map(str, _cards().unpublished))


def load(name: str) -> ModelConfig:
    """The architecture of a file, as ``train.py`` composes it."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), _merged(name))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig), f"{type(config)=}"
    return config


def parent(name: str) -> str | None:
    """The file that a file inherits, if any."""
    parents = [str(each) for each in _file(name).get("defaults", []) if each != "_self_"]
    assert len(parents) <= 1, f"{name=} {parents=}"
    return parents[0] if parents else None


def lineage(name: str) -> list[str]:
    """A file and all that it inherits, the nearest first."""
    above = parent(name)
    return [name, *(lineage(above) if above else [])]


def tiny_of(name: str) -> str | None:
    """The size for a CPU that is the nearest relative: fewest files up to a common one and down again."""
    own = lineage(name)

    def distance(tiny: str) -> int:
        theirs = lineage(tiny)
        return min(own.index(each) + theirs.index(each) for each in theirs if each in own)

    return min((tiny for tiny in tiny_ones() if {*own} & {*lineage(tiny)}), key=distance, default=None)


def text(name: str) -> Text:
    """What a file's comment says; what is unusual is taken from a file that it inherits, where its own says nothing."""
    own = read_comment(_comment(name))
    above = None if name in without_dimensions() else parent(name)
    if own.unusual or above is None:
        return own
    return replace(own, unusual=text(above).unusual)


def published(name: str) -> Published:
    """The publisher's figures."""
    given = _cards().published.get(name) or {}
    return Published(given.get("total"), given.get("active"), given.get("note"))


def stand_in_note(name: str) -> str | None:
    """What a run must say that trains an open architecture in place of an unpublished one; None for all others."""
    if not name.endswith(STAND_IN):
        return None
    above = parent(name)
    assert above is not None, f"{name=}"
    return f"model={name}: the architecture of {text(name).name} is unpublished, this is {text(above).name}"


def read_comment(comment: str) -> Text:
    """Take a comment apart: the name up to the first of ``. : ;``, what is unusual, sources, remarks.

    Example: ``GPT-2 124M: plain. arXiv 1, table 2. Big.`` is ``GPT-2 124M``, ``Plain``, ``arXiv 1, table 2``, ``Big``.
    """
    first, *others = [sentence for sentence in SENTENCE.split(comment) if sentence]
    name, *rest = re.split(r"[:;]\s", first, maxsplit=1)
    sentences = [*(each[0].upper() + each[1:] for each in rest), *others]
    unusual = list(takewhile(lambda each: not SOURCE.search(each), sentences))
    source, *remarks = [*sentences[len(unusual) :], ""]
    return Text(name, unusual, source, [each for each in remarks if each])


def _comment(name: str) -> str:
    if name in without_dimensions():
        return str(_cards().unpublished[name])
    lines = takewhile(lambda line: line.startswith("#"), (MODELS / f"{name}.yaml").read_text("utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def _files() -> list[str]:
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


@cache
def _cards() -> DictConfig:
    return cast(DictConfig, OmegaConf.load(CARDS))


@cache
def _file(name: str) -> DictConfig:
    return cast(DictConfig, OmegaConf.load(MODELS / f"{name}.yaml"))


def _merged(name: str) -> DictConfig:
    """A file over what it inherits, untyped."""
    own = deepcopy(_file(name))
    own.pop("defaults", None)
    above = parent(name)
    return cast(DictConfig, OmegaConf.merge(_merged(above), own)) if above else own
