"""Safetensors files of a Hugging Face folder: read lazily, written in shards, the folder whole or not there at all."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.hf_fields import HFError, read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MTP_FILES = "mtp*.safetensors"
FILE = re.compile(r"[^/\\\0]+\.safetensors")
READABLE = {"F64", "F32", "F16", "BF16"}


class Stored:
    """The tensors of a folder by key; only headers are read until one is asked for.

    Raises:
        HFError: a file is missing, truncated or no safetensors file, or lacks what the index says it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder / INDEX) if (folder / INDEX).exists() else {}
        names = set(index.values()) or {SINGLE}
        names |= {path.name for path in folder.glob(MTP_FILES)}
        self._files: dict[str, Any] = {}
        for name in sorted(names):
            opened = _open(folder / name)
            self._files |= dict.fromkeys(opened.keys(), opened)
        for key in index:
            if key not in self._files:
                raise HFError(f"{folder / index[key]}: lacks {key}, which {INDEX} says it holds")

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def keys(self) -> set[str]:
        """All keys, of all files."""
        return set(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header.

        Raises:
            HFError: it is stored in a dtype that holds no plain weights.
        """
        header = self._files[key].get_slice(key)
        if header.get_dtype() not in READABLE:
            raise HFError(f"{self.folder}: {key} is {header.get_dtype()}: must be one of {sorted(READABLE)}")
        return tuple(header.get_shape())

    def get(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._files[key].get_tensor(key)

    def half(self, key: str, half: int) -> Tensor:
        """Read the first (0) or second (1) half of dimension 1 of one tensor."""
        rows = self._files[key].get_slice(key)
        middle = rows.get_shape()[1] // 2
        return rows[:, :middle] if half == 0 else rows[:, middle:]


class Shards:
    """Writes tensors into numbered files of at most ``limit`` bytes (more only for a single larger tensor)."""

    def __init__(self, folder: Path, stem: str, *, limit: int) -> None:
        self.folder = folder
        self.stem = stem
        self.limit = limit
        self.total = 0  # bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._written: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a copy of one tensor, and write a file when enough wait."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.limit:
            self._flush()
        self._waiting[key] = tensor.detach().to("cpu", copy=True).contiguous()
        self._waiting_bytes += size
        self.total += size

    def finish(self) -> dict[str, str]:
        """Write what waits and number the files; key → file. One file alone has no number."""
        if self._waiting:
            self._flush()
        files: dict[str, str] = {}
        for place, keys in enumerate(self._written):
            name = f"{self.stem}.safetensors"
            if len(self._written) > 1:
                name = f"{self.stem}-{place + 1:05d}-of-{len(self._written):05d}.safetensors"
            self._part(place).rename(self.folder / name)
            files |= dict.fromkeys(keys, name)
        return files

    def _flush(self) -> None:
        save_file(self._waiting, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, place: int) -> Path:
        return self.folder / f"{self.stem}.part{place}"


@contextmanager
def whole_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Give an empty folder beside ``folder`` that takes its name if the block ends well, and vanishes if it does not.

    Raises:
        HFError: ``folder`` holds something and ``replace`` is false, or what it holds is no such folder; or the disk
            does not take the files.
    """
    folder = folder.resolve()  # "." has no folder beside it, and a link is not what is replaced
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not replace:
        raise HFError(f"{folder}: exists: must be a new or empty folder")
    if occupied and not (folder / CONFIG).is_file():
        raise HFError(f"{folder}: has no {CONFIG}: must be a new folder, an empty one, or one to replace")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            fresh = Path(beside) / "fresh"
            fresh.mkdir()
            yield fresh
            if occupied:
                folder.rename(Path(beside) / "old")
            fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        raise HFError(f"{folder}: cannot be written: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented as Hugging Face does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def carry(files: list[Path], folder: Path) -> None:
    """Copy files into a folder under their own names."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def dtype_name(dtype: torch.dtype) -> str:
    """As ``config.json`` spells it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def _read_index(path: Path) -> dict[str, str]:
    """File of every key; a file is one of the same folder."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict):
        raise HFError(f"{path}: weight_map={json.dumps(files)}: must be an object of keys and files")
    for key, name in files.items():
        if not isinstance(name, str) or not FILE.fullmatch(name):
            raise HFError(f"{path}: {key}={json.dumps(name)}: must be a .safetensors file of the same folder")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except FileNotFoundError as error:
        raise HFError(f"{path}: no such file: must be a folder of safetensors files") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise HFError(f"{path}: is no whole safetensors file: {error}") from error
