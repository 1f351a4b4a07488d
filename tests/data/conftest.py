"""Small corpora: a tokenizer of single bytes makes every expected token plain to see."""

import base64
import json

import pytest

from data.config import DataConfig, Kind, PrepareConfig, TokenizerConfig, TokenizerKind
from data.prepare import prepare

EOS = 256


@pytest.fixture
def byte_ranks(tmp_path):
    """A tiktoken file whose tokens are the bytes, and EOS 256."""
    path = tmp_path / "bytes.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256)))
    settings = {"pattern": r"(?s:.)", "special_tokens": {"<|endoftext|>": EOS}}
    path.with_name(path.name + ".json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def byte_tokenizer(byte_ranks):
    return TokenizerConfig(kind=TokenizerKind.tiktoken, file=str(byte_ranks))


@pytest.fixture
def make_shards(tmp_path, byte_tokenizer):
    """Prepare texts with tokens that are bytes; returns the config of a run that reads them."""

    def make(texts, *, name="shards", shard_tokens=1000, validation=0.0):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(
            PrepareConfig(
                source=str(source),
                out=str(tmp_path / name),
                tokenizer=byte_tokenizer,
                shard_tokens=shard_tokens,
                validation=validation,
            )
        )
        return DataConfig(kind=Kind.shards, folder=str(tmp_path / name))

    return make


@pytest.fixture
def texts():
    """Documents of 1 to 120 characters, all different."""
    return [f"{number}:" + "abcdefgh" * (number * 7 % 15) for number in range(200)]


@pytest.fixture
def stream(texts):
    """The tokens of ``texts`` and whether a document starts, one after another."""
    tokens, starts = [], []
    for text in texts:
        tokens += [*text.encode(), EOS]
        starts += [True] + [False] * len(text)
    return tokens, starts
