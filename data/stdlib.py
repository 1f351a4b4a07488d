"""The embedded corpus: the sources of the standard library of the interpreter that runs."""

import hashlib
import io
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.manifest import Settings
from data.text import Document

# Tests are repetitive and hold broken encodings on purpose; packages are not the same on every machine
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class StdlibSource:
    """Every module, in the order of its path, one a document."""

    def __init__(self) -> None:
        """Find and hash the sources: about 13 MB, a quarter of a second.

        Raises:
            DataError: This interpreter has none in files.
        """
        root = Path(sysconfig.get_paths()["stdlib"])
        self._files = sorted(_modules(root), key=lambda file: file.relative_to(root).parts)
        if not self._files:
            raise DataError(f"{root}: this Python has no sources of its standard library there; use another data=")
        corpus = hashlib.sha256()
        for file in self._files:
            content = _read(file)
            corpus.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            corpus.update(content)
        self.description = f"standard library of Python {platform.python_version()} ({len(self._files)} files)"
        self.settings: Settings = {"source": "stdlib", "corpus_sha256": corpus.hexdigest()}

    def documents(self, start: int) -> Iterator[Document]:
        """Modules from number ``start`` on."""
        for number, file in enumerate(self._files[start:], start=start):
            yield Document(number=number, text=_text(file))


def _modules(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and path.name not in LEFT_OUT:
            yield from _modules(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def _text(file: Path) -> str:
    """Decode a module as Python itself does, by the coding that its first lines declare."""
    content = _read(file)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be decoded: {error}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
