"""A run's folder: its files are whole or not there, and say of the run what is needed beside its results."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

RUN = "run.yaml"
TOKENIZER = "tokenizer"  # folder of the tokenizer's files, which an export carries along


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have a refusal of the file system name the file in one line."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the path of a file to write, which becomes ``path`` when all of it is there and goes when it is not."""
    partial = path.with_name(f".{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def record(folder: Path, *, settings: dict[str, Any], tokenizer: Sequence[Path], rank: int) -> None:
    """Write the resolved run and copy the tokenizer's files, in place of any other's; rank 0 only."""
    if rank != 0:
        return
    with whole(folder / RUN) as partial:
        OmegaConf.save(OmegaConf.create(settings), partial)
    place = folder / TOKENIZER
    with writing(place):
        place.mkdir(exist_ok=True)
        ours = {file.name for file in tokenizer}
        for path in place.iterdir():
            if path.is_file() and path.name not in ours:
                path.unlink()
    for file in tokenizer:
        content = file.read_bytes()
        with whole(place / file.name) as partial:
            partial.write_bytes(content)
