"""What a folder of shards says of itself; a folder without this file is not whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import write_whole

NAME = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Settings = dict[str, str | int | float | None]  # by the keys of the command line


@dataclass(frozen=True)
class ShardEntry:
    """One shard: ``name``.bin holds its tokens, ``name``.idx its documents and checksums."""

    name: str
    tokens: int
    documents: int
    text_bytes: int  # UTF-8, before tokenising
    sha256: str  # of the .bin


@dataclass(frozen=True)
class Split:
    """Shards in order, and their sums."""

    tokens: int
    documents: int
    text_bytes: int
    shards: list[ShardEntry]


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer, whose files lie in the same folder; the first is the one that its library reads."""

    kind: str
    files: list[str]
    sha256: str  # of the first file
    vocab_size: int
    eos: int
    eos_token: str | None  # null: the tokenizer declares it itself


@dataclass(frozen=True)
class Manifest:
    """A whole corpus. ``unigram_entropy`` is in nats a token, over both splits, EOS included."""

    format: int
    source: str
    settings: Settings  # all that decides the bytes of the shards
    tokenizer: TokenizerEntry
    dtype: str
    unigram_entropy: float
    splits: dict[str, Split]

    def write(self, folder: Path) -> None:
        """Make ``folder`` whole: the last step of a preparation."""
        write_whole(folder / NAME, content=(json.dumps(asdict(self), indent=1) + "\n").encode())


def read_manifest(folder: str | Path) -> Manifest:
    """Read what ``folder`` holds.

    Raises:
        DataError: There is no whole corpus, or it is of another format.
    """
    path = Path(folder) / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder}: no whole corpus ({NAME} is missing); python -m data.prepare makes one") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: is damaged: {error}; remove the folder and prepare it anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise DataError(f"{path}: format={found}: must be {FORMAT}; prepare the folder anew")
    try:
        manifest = _build(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is damaged: {type(error).__name__} {error}") from error
    _check(manifest, path=path)
    return manifest


def total(shards: list[ShardEntry]) -> Split:
    """Sum up the shards of a split."""
    return Split(
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        shards=shards,
    )


def file_sha256(path: Path) -> str:
    """Checksum of a small file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _build(content: Mapping) -> Manifest:
    splits = {}
    for name, split in content["splits"].items():
        splits[name] = Split(**{**split, "shards": [ShardEntry(**shard) for shard in split["shards"]]})
    return Manifest(**{**content, "tokenizer": TokenizerEntry(**content["tokenizer"]), "splits": splits})


def _check(manifest: Manifest, *, path: Path) -> None:
    """Refuse a manifest that was edited by hand into something that would be read wrongly."""
    if manifest.dtype not in DTYPES:
        raise DataError(f"{path}: dtype={manifest.dtype}: must be one of {', '.join(DTYPES)}")
    if sorted(manifest.splits) != sorted(SPLITS):
        raise DataError(f"{path}: splits={sorted(manifest.splits)}: must be {', '.join(SPLITS)}")
    for name, split in manifest.splits.items():
        if split != total(split.shards):
            raise DataError(f"{path}: the totals of {name} are not the sums of its shards; prepare the folder anew")
