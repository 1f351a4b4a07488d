"""What a run needs to know of its data beside the rows: its vocabulary, and how to turn tokens into text."""

from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig, Kind
from data.loader import vocab_size
from data.manifest import read_manifest
from data.tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Facts of the data.

    Attributes:
        vocab_size: tokens that may occur.
        fingerprint: of what the tokens mean; two runs whose fingerprints differ do not speak the same language.
        unigram_entropy: nats a token; None: not known.
        tokenizer: None: tokens stand for no text.
    """

    vocab_size: int
    fingerprint: str
    unigram_entropy: float | None
    tokenizer: Tokenizer | None

    @property
    def files(self) -> list[Path]:
        """The tokenizer's, to carry along with a model."""
        return [] if self.tokenizer is None else self.tokenizer.files


def declared_vocabulary(config: DataConfig) -> int | None:
    """Tokens that may occur, as far as it is known before anything is prepared; None: it is not.

    Raises:
        DataError: a folder of shards is missing, not whole or damaged.
    """
    return config.vocab_size if config.kind is Kind.stdlib else vocab_size(config)


def open_corpus(config: DataConfig) -> Corpus:
    """Read the facts of whole data.

    Raises:
        DataError: a folder of shards is missing, not whole or damaged.
    """
    size = vocab_size(config)
    if config.kind is Kind.synthetic:
        return Corpus(size, fingerprint=f"synthetic/{size}", unigram_entropy=None, tokenizer=None)
    assert config.folder is not None, f"{config=}"
    manifest = read_manifest(config.folder)
    tokenizer = open_tokenizer(config.folder)
    return Corpus(
        size, fingerprint=manifest.tokenizer.sha256, unigram_entropy=manifest.unigram_entropy, tokenizer=tokenizer
    )
