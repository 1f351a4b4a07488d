"""Readers: files of several formats to a numbered sequence of texts, from any number on."""

import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from data.errors import DataError
from data.manifest import Settings


@dataclass(frozen=True)
class Document:
    """A text and its number in the source, from 0."""

    number: int
    text: str


class Source(Protocol):
    """A sequence of documents that is the same each time."""

    description: str  # for people
    settings: Settings  # what identifies the sequence: another value is another sequence

    def documents(self, start: int) -> Iterator[Document]:
        """Documents from number ``start`` on."""


class FileSource:
    """Files, one after another, in the order of their paths."""

    def __init__(self, path: str, *, pattern: str, text_key: str) -> None:
        """Find the files: ``path`` itself, those below it if a folder, or those it matches if it holds ``*``.

        Raises:
            DataError: There are none.
        """
        self._files = _find(path, pattern=pattern)
        self._text_key = text_key
        listing = hashlib.sha256()
        for file in self._files:
            listing.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        self.description = f"{path} ({len(self._files)} files)"
        self.settings: Settings = {
            "source": f"files with sha256 of names and sizes {listing.hexdigest()}",
            "text_key": text_key,
        }

    def documents(self, start: int) -> Iterator[Document]:
        """Documents from number ``start`` on; what comes before is counted, not decoded."""
        number = 0
        for file in self._files:
            for text in _reader(file)(file, text_key=self._text_key, skip=max(0, start - number)):
                if text is not None:
                    yield Document(number=number, text=text)
                number += 1


def decode(content: bytes, *, path: Path, offset: int = 0) -> str:
    """UTF-8 to text.

    Raises:
        DataError: It is not UTF-8; names the byte, counted from ``offset``.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise DataError(f"{path}: is not UTF-8 at byte {where} (0x{content[error.start]:02x})") from None


def record_text(record: object, *, text_key: str, where: str) -> str:
    """The text of a record.

    Raises:
        DataError: The record has none.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: is a {type(record).__name__}: must be an object with the key {text_key}")
    if text_key not in record:
        raise DataError(f"text_key={text_key}: must be a key of {where}, one of {', '.join(map(str, record))}")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_key} is a {type(text).__name__}: must be a text")
    return text


def _find(path: str, *, pattern: str) -> list[Path]:
    root = Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        below = [file for file in root.rglob("*") if not _hidden(file.relative_to(root))]
        files = [file for file in below if fnmatch(file.name, pattern) and file.is_file()]
    elif glob.has_magic(path):
        files = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]
    else:
        raise DataError(f"source={path}: must be a file, a folder, a pattern with *, hf:NAME or stdlib")
    if not files:
        raise DataError(f"source={path}: has no files" + (f" named {pattern}" if root.is_dir() else ""))
    return sorted(files, key=lambda file: file.parts)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


Reader = Callable[..., Iterator[str | None]]  # yields None for each of the first ``skip`` records


def _reader(path: Path) -> Reader:
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _read_jsonl
    return _read_parquet if path.suffix == ".parquet" else _read_text


def _read_text(path: Path, *, text_key: str, skip: int) -> Iterator[str | None]:
    """One file, one document; ``text_key`` is not used."""
    if skip:
        yield None
        return
    with _opened(path) as lines:
        content = b"".join(_guarded(lines, path=path))
    yield decode(content, path=path)


def _read_jsonl(path: Path, *, text_key: str, skip: int) -> Iterator[str | None]:
    """One line, one document; an empty line is an empty document."""
    offset = 0
    with _opened(path) as lines:
        for number, line in enumerate(_guarded(lines, path=path)):
            if number < skip:
                yield None
            else:
                yield _json_text(
                    decode(line, path=path, offset=offset), text_key=text_key, where=f"{path}:{number + 1}"
                )
            offset += len(line)


def _json_text(line: str, *, text_key: str, where: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON: {error}") from None
    return record_text(record, text_key=text_key, where=where)


def _read_parquet(path: Path, *, text_key: str, skip: int) -> Iterator[str | None]:
    """One row, one document; row groups before ``skip`` are not read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_key not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise DataError(f"text_key={text_key}: must be a column of {path}, one of {names}")
            number = 0
            for group in range(table.num_row_groups):
                n_rows = table.metadata.row_group(group).num_rows
                if number + n_rows <= skip:
                    yield from (None for _ in range(n_rows))
                    number += n_rows
                    continue
                for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=[text_key]):
                    for text in batch.column(0).to_pylist():
                        where = f"{path}: row {number}"
                        record = {text_key: text}
                        yield None if number < skip else record_text(record, text_key=text_key, where=where)
                        number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _opened(path: Path) -> io.BufferedIOBase:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _guarded(lines: Iterable[bytes], *, path: Path) -> Iterator[bytes]:
    """Lines of a file; a file that breaks off or is no gzip is one line of complaint."""
    try:
        yield from lines
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
