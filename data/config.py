"""What is read for training and how text becomes shards, as data; no torch, no other room."""

from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """Where training tokens come from."""

    stdlib = "stdlib"  # embedded corpus: this interpreter's own standard library
    synthetic = "synthetic"  # endless, computed, no files
    shards = "shards"  # a folder that ``python -m data.prepare`` made


class TokenizerKind(StrEnum):
    """Which library reads the tokenizer."""

    sentencepiece = "sentencepiece"
    tokenizers = "tokenizers"  # Hugging Face tokenizer.json
    tiktoken = "tiktoken"


@dataclass
class TokenizerConfig:
    """The tokenizer that a corpus is prepared with."""

    kind: TokenizerKind = TokenizerKind.sentencepiece
    file: str | None = None  # null with sentencepiece: one is trained on the corpus
    name: str | None = None  # tiktoken only: an encoding of the library, such as o200k_base
    eos: str | None = None  # the token that ends a document; null: the one that the tokenizer declares

    def __post_init__(self) -> None:
        if self.kind is TokenizerKind.tokenizers:
            check(self.file is not None, "tokenizer.file", self.file, "a tokenizer.json")
        if self.kind is TokenizerKind.tiktoken:
            check((self.file is None) != (self.name is None), "tokenizer.name", self.name, "given, or else file")
        else:
            check(self.name is None, "tokenizer.name", self.name, f"null with kind={self.kind.value}; give file")


@dataclass
class DataConfig:
    """The data of a run: one choice of the group ``data=``."""

    kind: Kind = Kind.stdlib
    folder: str | None = None  # of the shards, relative to the working directory; never ./data, which is code
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # stdlib only: others have theirs or none
    vocab_size: int | None = None  # stdlib: of the tokenizer to train; synthetic: of the alphabet
    validation: float = 0.0  # stdlib only: share of the documents that is held out

    def __post_init__(self) -> None:
        if self.kind is Kind.synthetic:
            check(self.vocab_size is not None and self.vocab_size >= 8, "data.vocab_size", self.vocab_size, "8 or more")
            return
        check(bool(self.folder), "data.folder", self.folder, "a folder of shards; python -m data.prepare makes one")
        if self.kind is Kind.stdlib:
            check_training(self.tokenizer, vocab_size=self.vocab_size, key="data.vocab_size")
            check(0 < self.validation < 1, "data.validation", self.validation, "above 0 and below 1")


@dataclass
class HubConfig:
    """What ``datasets.load_dataset`` is asked for, beside the name in ``source=hf:NAME``."""

    config: str | None = None
    split: str = "train"
    streaming: bool = False
    data_files: str | None = None
    data_dir: str | None = None
    revision: str | None = None


@dataclass
class PrepareConfig:
    """The command line of ``python -m data.prepare``."""

    source: str | None = None  # a file, a folder, a pattern with *, hf:NAME or stdlib
    out: str | None = None  # folder to make
    text_key: str = "text"  # of the text in jsonl, parquet and datasets
    pattern: str = "*"  # names of the files to read in a folder
    hub: HubConfig = field(default_factory=HubConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    vocab_size: int | None = None  # of a SentencePiece to train
    validation: float = 0.005  # share of the documents, drawn by a hash of their text
    shard_tokens: int = 2**26  # a shard ends with the document that reaches this; it is also the step of resumption
    threads: int = 0  # of the tokenizer; 0: one for each core

    def __post_init__(self) -> None:
        check(bool(self.source), "source", self.source, "a file, a folder, a pattern with *, hf:NAME or stdlib")
        check(bool(self.out), "out", self.out, "a folder to make")
        check_training(self.tokenizer, vocab_size=self.vocab_size, key="vocab_size")
        check(0 <= self.validation < 1, "validation", self.validation, "from 0 to below 1")
        check(self.shard_tokens >= 1, "shard_tokens", self.shard_tokens, "1 or more")
        check(self.threads >= 0, "threads", self.threads, "0 or more")


def check_training(tokenizer: TokenizerConfig, *, vocab_size: int | None, key: str) -> None:
    """Check that ``vocab_size`` is given exactly when a SentencePiece is to be trained."""
    if tokenizer.kind is TokenizerKind.sentencepiece and tokenizer.file is None:
        # 2 control pieces, 3 of white space and 256 bytes come before anything is learnt
        check(vocab_size is not None and vocab_size >= 300, key, vocab_size, "300 or more, to train a tokenizer of")
    else:
        check(vocab_size is None, key, vocab_size, "null: the tokenizer that is given has its own size")


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise the one-line ``ValueError`` of a value that a user can correct."""
    if not holds:
        raise ValueError(f"{key}={value}: must be {allowed}")
