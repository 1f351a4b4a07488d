"""One face for three tokenizer libraries. What is encoded never holds a control token: text that spells one is text."""

import base64
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from data.config import TokenizerKind
from data.errors import DataError
from data.manifest import file_sha256, read_manifest

SPACE = "\u2581"  # SentencePiece writes a space so, and would read this character as a space


class Tokenizer(ABC):
    """Text to numbers and back.

    ``files``: what to carry along, the first is the one that is read. ``eos``: the token that ends a document.
    ``vocab_size``: one more than the largest token number.
    """

    files: list[Path]
    vocab_size: int
    eos: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[list[int]]:
        """Encode several texts at once; the result does not depend on ``threads``."""

    @abstractmethod
    def _decode(self, tokens: list[int]) -> str:
        """Decode tokens that are all in the vocabulary and none EOS."""

    def encode(self, text: str) -> list[int]:
        """Token numbers of ``text``, without EOS."""
        return self.encode_batch([text], threads=1)[0]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``; EOS is left out, and a number beyond the vocabulary becomes U+FFFD.

        Models pad their vocabulary and, untrained, may sample such numbers.
        """
        text = []
        for known, group in itertools.groupby(tokens, key=lambda token: 0 <= token < self.vocab_size):
            run = [token for token in group if token != self.eos]
            text.append(self._decode(run) if known else "\ufffd" * len(run))
        return "".join(text)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    def __init__(self, path: Path, *, eos: str | None) -> None:
        """Read ``path``; raises DataError if it is no model or has no such EOS."""
        import sentencepiece

        self.files = [path]
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=_read(path))
        except RuntimeError as error:
            raise DataError(f"{path}: is no SentencePiece model") from error
        self.vocab_size = self._model.vocab_size()
        self.eos = self._model.eos_id() if eos is None else self._model.piece_to_id(eos)
        if self.eos < 0 or (eos is not None and self.eos == self._model.unk_id()):
            raise _no_eos(path, eos=eos)
        # A model that puts a space before every text cannot encode a text in parts
        dummy_prefix = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        spelled = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        has_bytes = all(self._model.is_byte(token) for token in spelled)
        self._spelled_space = spelled if has_bytes and not dummy_prefix else None

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[list[int]]:
        """Encode several texts at once; U+2581 itself is spelled in bytes where the model has them."""
        encoded = self._model.encode(list(texts), out_type=int, num_threads=threads)
        if self._spelled_space is not None:
            for number, text in enumerate(texts):
                if SPACE in text:
                    encoded[number] = self._encode_parts(text.split(SPACE), between=self._spelled_space)
        return encoded

    def _encode_parts(self, parts: list[str], *, between: list[int]) -> list[int]:
        tokens = self._model.encode(parts[0], out_type=int)
        for part in parts[1:]:
            tokens += between + self._model.encode(part, out_type=int)
        return tokens

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json; tokenizer_config.json beside it, if there, names EOS and is carried along."""

    def __init__(self, path: Path, *, eos: str | None) -> None:
        """Read ``path``; raises DataError if it is no tokenizer or no EOS is known."""
        import tokenizers

        settings = path.with_name("tokenizer_config.json")
        self.files = [path, settings] if settings.is_file() else [path]
        try:
            self._model = tokenizers.Tokenizer.from_str(_read(path).decode())
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: is no tokenizer.json: {error}") from error
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # as text: else a document could end in its middle
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        token = eos or (_declared_eos(settings) if settings.is_file() else None)
        number = self._model.token_to_id(token) if token else None
        if number is None:
            raise _no_eos(path, eos=token)
        self.eos = number

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[list[int]]:
        """Encode several texts at once; the library chooses its threads itself."""
        return [e.ids for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens, skip_special_tokens=False)


class TiktokenTokenizer(Tokenizer):
    r"""A file of ranks (base64 token, space, rank); FILE.json beside it holds its pattern and special tokens.

    Example of the latter: {"pattern": "\\w+|\\W", "special_tokens": {"<|endoftext|>": 256}}.
    """

    def __init__(self, path: Path, *, eos: str | None) -> None:
        """Read ``path``; raises DataError if it is no file of ranks or no EOS is known."""
        import tiktoken

        settings = path.with_name(path.name + ".json")
        self.files = [path, settings]
        lines = _read(path).split(b"\n")
        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        except ValueError as error:
            raise DataError(f"{path}: is no file of tiktoken ranks: {error}") from error
        try:
            content = json.loads(_read(settings))
            special, pattern = content["special_tokens"], content["pattern"]
            self._model = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{settings}: must hold pattern and special_tokens: {error}") from error
        self.vocab_size = self._model.n_vocab
        token = eos or "<|endoftext|>"  # the library's own name for it, Encoding.eot_token
        if token not in special:
            raise _no_eos(path, eos=token)
        self.eos = special[token]

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[list[int]]:
        """Encode several texts at once."""
        return self._model.encode_ordinary_batch(list(texts), num_threads=threads)

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)


def open_file(path: Path, *, kind: TokenizerKind, eos: str | None) -> Tokenizer:
    """Open a tokenizer by its file.

    Raises:
        DataError: It cannot be read, or ``eos`` is not in it.
    """
    if kind is TokenizerKind.sentencepiece:
        return SentencePieceTokenizer(path, eos=eos)
    if kind is TokenizerKind.tokenizers:
        return HuggingFaceTokenizer(path, eos=eos)
    return TiktokenTokenizer(path, eos=eos)


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """Open the tokenizer that the shards in ``folder`` were made with.

    Raises:
        DataError: The folder is not whole, or its tokenizer is not the one that it was prepared with.
    """
    entry = read_manifest(folder).tokenizer
    path = Path(folder) / entry.files[0]
    if file_sha256(path) != entry.sha256:
        raise DataError(f"{path}: is not the tokenizer that the shards beside it were made with")
    return open_file(path, kind=TokenizerKind(entry.kind), eos=entry.eos_token)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}") from error


def _declared_eos(settings: Path) -> str | None:
    """EOS of a tokenizer_config.json: a string, or an object with the string in ``content``."""
    try:
        token = json.loads(settings.read_bytes()).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{settings}: is damaged: {error}") from error
    return token.get("content") if isinstance(token, dict) else token


def _no_eos(path: Path, *, eos: str | None) -> DataError:
    return DataError(f"tokenizer.eos={eos}: must name the token of {path} that ends a document")
