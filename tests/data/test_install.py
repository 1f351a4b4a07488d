"""Tokenizers trained, copied and saved."""

import sysconfig
from pathlib import Path

import pytest
import tiktoken

from data.config import TokenizerConfig, TokenizerKind
from data.errors import DataError
from data.install import entry, install, train
from data.manifest import file_sha256

TEXTS = [file.read_text() for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py"))]


def test_training_twice_gives_the_same_bytes():
    assert train(TEXTS, vocab_size=500) == train(iter(TEXTS), vocab_size=500)


def test_a_trained_tokenizer_has_the_size_that_was_asked_for_and_is_not_trained_again(tmp_path):
    config = TokenizerConfig()
    tokenizer = install(config, folder=tmp_path, vocab_size=500, texts=TEXTS)
    assert tokenizer.vocab_size == 500 and tokenizer.eos == 1
    again = install(config, folder=tmp_path, vocab_size=500, texts=iter(["not read"]))
    assert again.encode("import json\n") == tokenizer.encode("import json\n")


def test_a_text_too_small_for_the_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"vocab_size=5000: must be lower: the text is too small") as caught:
        train(["hello world"], vocab_size=5000)
    assert "\n" not in str(caught.value)


def test_a_given_tokenizer_is_copied_with_what_belongs_to_it(tmp_path, byte_ranks):
    folder = tmp_path / "shards"
    folder.mkdir()
    config = TokenizerConfig(kind=TokenizerKind.tiktoken, file=str(byte_ranks))
    tokenizer = install(config, folder=folder, vocab_size=None, texts=[])
    described = entry(tokenizer, config=config)
    assert described.files == ["tokenizer.tiktoken", "tokenizer.tiktoken.json"]
    assert described.sha256 == file_sha256(byte_ranks)
    byte_ranks.unlink()
    assert install(config, folder=folder, vocab_size=None, texts=[]).encode("é") == [0xC3, 0xA9]


def test_a_named_encoding_is_saved_for_use_without_the_network(tmp_path, monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding("x", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    config = TokenizerConfig(kind=TokenizerKind.tiktoken, name="o200k_base")
    tokenizer = install(config, folder=tmp_path, vocab_size=None, texts=[])
    assert tokenizer.encode("ab c") == [256, 32, 99]
    assert (tokenizer.eos, tokenizer.vocab_size) == (257, 258)


def test_a_named_encoding_that_is_unknown_or_out_of_reach_is_one_line(tmp_path, monkeypatch):
    config = TokenizerConfig(kind=TokenizerKind.tiktoken, name="gpt5000")
    with pytest.raises(DataError, match=r"tokenizer\.name=gpt5000: must be one of .*o200k_base"):
        install(config, folder=tmp_path, vocab_size=None, texts=[])

    def unreachable(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(DataError, match=r"tokenizer\.name=gpt5000: tiktoken cannot download it \(ConnectionError\)"):
        install(config, folder=tmp_path, vocab_size=None, texts=[])
