"""Safetensors files of a Hugging Face folder: read lazily, written in shards, the folder whole or not there at all."""

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.hf_fields import HFError, read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MTP_FILES = "mtp*.safetensors"
TOKENIZER_FILES = (  # patterns: as transformers names them, its own formats, those it reads, and code of a tokenizer
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "tiktoken.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "tokenization_*.py"),
)
HEAD = "lm_head."
WRITTEN = re.compile(r"(model|mtp)(-\d{5}-of-\d{5})?\.safetensors")
"""Of weights, as ``Shards`` names them."""
FILE = re.compile(r"[^/\\\0]+\.safetensors")
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {code: dtype for dtype, code in CODES.items()}
READABLE = set(DTYPES)


class Stored:
    """The tensors of a folder by key; only headers are read until one is asked for, and no file stays open.

    A file that stays mapped would count as memory, page by page as its tensors are read.

    Args:
        folder: that holds the files.
        prefix: of the keys of a whole model, which files of the bare one lack; all keys are given one then.

    Raises:
        HFError: a file is missing, truncated or no safetensors file, or lacks what the index says it holds.
    """

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        self.folder = folder
        index = _read_index(folder / INDEX) if (folder / INDEX).exists() else {}
        names = set(index.values()) or {SINGLE}
        names |= {path.name for path in folder.glob(MTP_FILES)}
        self._files: dict[str, Path] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in sorted(names):
            with _open(folder / name) as opened:
                for key in opened.keys():
                    header = opened.get_slice(key)
                    self._files[key] = folder / name
                    self._kinds[key] = header.get_dtype(), tuple(header.get_shape())
        for key in index:
            if key not in self._files:
                raise HFError(f"{folder / index[key]}: lacks {key}, which {INDEX} says it holds")
        bare = not any(key.startswith(prefix) for key in self._files)
        self._names = {prefix + key if bare and not key.startswith(HEAD) else key: key for key in self._files}

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def keys(self) -> set[str]:
        """All keys, of all files."""
        return set(self._names)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header.

        Raises:
            HFError: it is stored in a dtype that holds no plain weights.
        """
        dtype, shape = self._kinds[self._names[key]]
        if dtype not in READABLE:
            raise HFError(f"{self.folder}: {key} is {dtype}: must be one of {sorted(READABLE)}")
        return shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor whose shape has been asked for, from the header."""
        return DTYPES[self._kinds[self._names[key]][0]]

    def get(self, key: str) -> Tensor:
        """Read one tensor."""
        name = self._names[key]
        with _open(self._files[name]) as opened:
            return opened.get_tensor(name)

    def slabs(self, key: str) -> Iterator[Tensor]:
        """Read one tensor piece by piece: for each place in its first dimension what is there, (1, …)."""
        name = self._names[key]
        for place in range(self.shape(key)[0]):
            with _open(self._files[name]) as opened:  # anew each time: what was read stays mapped
                yield opened.get_slice(name)[place : place + 1]


class Shards:
    """Writes tensors into numbered files of at most ``limit`` bytes (more only for a single larger tensor).

    No more than the tensor at hand is in memory: its bytes go to a file that waits until the header before them, which
    has to know all of them, can be written.
    """

    def __init__(self, folder: Path, stem: str, *, limit: int) -> None:
        self.folder = folder
        self.stem = stem
        self.limit = limit
        self.total = 0  # bytes
        self._waiting: dict[str, Tensor] = {}  # meta tensors: what of the open shard is on disk already
        self._waiting_bytes = 0
        self._written: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor, after the header of the shard before it if that is full."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.limit:
            self._flush()
        with self._data(tensor.element_size()).open("ab") as file:
            file.write(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._waiting[key] = tensor.to("meta")
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
        """Header, then the bytes: widest numbers first, so that each tensor begins at a multiple of its width."""
        widths = sorted({tensor.element_size() for tensor in self._waiting.values()}, reverse=True)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for width in widths:
            for key, tensor in self._waiting.items():
                if tensor.element_size() == width:
                    start, end = end, end + tensor.numel() * width
                    code = CODES[tensor.dtype]
                    header[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self._part(len(self._written)).open("xb") as whole:
            whole.write(len(text).to_bytes(8, "little") + text)
            for width in widths:
                with self._data(width).open("rb") as data:
                    shutil.copyfileobj(data, whole, 1 << 20)
                self._data(width).unlink()
        self._written.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, place: int) -> Path:
        return self.folder / f"{self.stem}.part{place}"

    def _data(self, width: int) -> Path:
        return self.folder / f"{self.stem}.bytes{width}"


@contextmanager
def whole_folder(folder: Path, *, replace: bool, carried: Collection[str] = ()) -> Iterator[Path]:
    """Give an empty folder beside ``folder`` that takes its name if the block ends well, and vanishes if it does not.

    Args:
        folder: new or empty.
        replace: whether it may also be one of ours, which goes then.
        carried: names of files that go into it beside what all such folders hold.

    Raises:
        HFError: ``folder`` holds something and ``replace`` is false, or it holds what we would not have written; or
            the disk does not take the files.
    """
    folder = folder.resolve()  # "." has no folder beside it, and a link is not what is replaced
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not replace:
        raise HFError(f"{folder}: exists: must be a new or empty folder")
    if occupied:
        _check_ours(folder, carried)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            fresh = Path(beside) / "fresh"
            fresh.mkdir()
            yield fresh
            if occupied:
                _check_ours(folder, carried)  # the weights took their time
                folder.rename(Path(beside) / "old")
            fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        raise HFError(f"{folder}: cannot be written: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented as Hugging Face does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that say what its tokens mean.

    Raises:
        HFError: what has such a name is no file, such as a link to nothing.
    """
    files = sorted(path for path in folder.iterdir() if _of_tokenizer(path))  # a glob passes over a broken link
    for path in files:
        if not path.is_file():
            raise HFError(f"{path}: must be a file, or a link to one that is there")
    return files


def _of_tokenizer(path: Path) -> bool:
    return any(path.match(pattern) for pattern in TOKENIZER_FILES)


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
    if not isinstance(files, dict) or not files:
        raise HFError(f"{path}: weight_map={json.dumps(files)}: must be an object of keys and files, of one at least")
    for key, name in files.items():
        if not isinstance(name, str) or not FILE.fullmatch(name):
            raise HFError(f"{path}: {key}={json.dumps(name)}: must be a .safetensors file of the same folder")
    return files


def _check_ours(folder: Path, carried: Collection[str]) -> None:
    """Refuse to delete anything but a folder of ours: the user may have named the wrong one."""
    allowed = "must be a new folder, an empty one, or one to replace"
    if not (folder / CONFIG).is_file():
        raise HFError(f"{folder}: has no {CONFIG}: {allowed}")
    for path in sorted(folder.iterdir()):
        named = path.name in (CONFIG, INDEX, *carried) or _of_tokenizer(path)
        ours = (named or WRITTEN.fullmatch(path.name)) and path.is_file() and not path.is_symlink()
        if not ours:
            raise HFError(f"{folder}: holds {path.name}, which no export writes: {allowed}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise HFError(f"{path}: no such file: must be a folder of safetensors files") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise HFError(f"{path}: is no whole safetensors file: {error}") from error
