"""Puts the tokenizer that a corpus is prepared with into its folder: trained on the spot, or copied."""

import base64
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.config import TokenizerConfig, TokenizerKind
from data.errors import DataError
from data.files import write_whole
from data.manifest import TokenizerEntry, file_sha256
from data.tokenizer import Tokenizer, open_file

TRAINING_CHARACTERS = 2**26  # held in memory while training
FILES = {
    TokenizerKind.sentencepiece: "tokenizer.model",
    TokenizerKind.tokenizers: "tokenizer.json",
    TokenizerKind.tiktoken: "tokenizer.tiktoken",
}


def install(config: TokenizerConfig, *, folder: Path, vocab_size: int | None, texts: Iterable[str]) -> Tokenizer:
    """Make the tokenizer's files in ``folder``, unless a preparation before left them there, and open them.

    Args:
        config: the choice.
        folder: of the shards.
        vocab_size: of a SentencePiece to train.
        texts: what to train it on; read from only then.

    Raises:
        DataError: The tokenizer cannot be read, or the texts do not hold enough to train it.
    """
    path = folder / FILES[config.kind]
    if not path.exists():
        if config.name is not None:
            _save_named(config.name, path=path)
        elif config.file is not None:
            given = open_file(Path(config.file), kind=config.kind, eos=config.eos)
            names = [path.name, *(_beside(path, file=file) for file in given.files[1:])]
            for file, name in reversed(list(zip(given.files, names, strict=True))):  # the main file last
                write_whole(folder / name, content=file.read_bytes())
        else:
            assert vocab_size is not None, f"{vocab_size=}"
            write_whole(path, content=train(texts, vocab_size=vocab_size))
    return open_file(path, kind=config.kind, eos=config.eos)


def entry(tokenizer: Tokenizer, *, config: TokenizerConfig) -> TokenizerEntry:
    """What the manifest says of an installed tokenizer."""
    return TokenizerEntry(
        kind=config.kind.value,
        files=[file.name for file in tokenizer.files],
        sha256=file_sha256(tokenizer.files[0]),
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos,
        eos_token=config.eos,
    )


def train(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a SentencePiece that gives back every text exactly, on the first 2^26 characters of ``texts``.

    BPE, because on the 12 MB of the standard library a vocabulary of 4,096 takes 4 s and a unigram model 128 s, at 3.2
    bytes a token both. One thread and every line, so that the same texts give the same bytes. Line breaks and tabs are
    pieces of their own, runs of spaces may be learnt, what is left is spelled in bytes.

    Returns:
        The model file.

    Raises:
        DataError: The texts hold too little for so many pieces.
    """
    import sentencepiece

    lines = list(_lines(texts))  # here, because the trainer loses an error that its iterator raises
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            user_defined_symbols=["\n", "\t", "\r"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        raise DataError(f"vocab_size={vocab_size}: must be lower: the text is too small for it ({error})") from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    n_characters = 0
    for text in texts:
        for line in text.split("\n"):
            if line:
                n_characters += len(line)
                yield line
        if n_characters >= TRAINING_CHARACTERS:
            return


def _beside(path: Path, *, file: Path) -> str:
    """Name in the folder of a file that a tokenizer has beside its main one."""
    return path.name + ".json" if path.suffix == ".tiktoken" else file.name


def _save_named(name: str, *, path: Path) -> None:
    """Write an encoding of tiktoken's own as files, so that the shards can be used without the network."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        known = ", ".join(tiktoken.list_encoding_names())
        raise DataError(f"tokenizer.name={name}: must be one of {known}") from None
    except OSError as error:
        raise DataError(f"tokenizer.name={name}: tiktoken cannot download it ({type(error).__name__})") from error
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in ranks]
    settings = {"pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
    write_whole(path.with_name(path.name + ".json"), content=(json.dumps(settings, indent=1) + "\n").encode())
    write_whole(path, content=b"".join(lines))
