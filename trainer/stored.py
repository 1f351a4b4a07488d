"""Tensors inside a checkpoint folder: DCP's files, read and written so that faults have plain words.

DCP pickles its table of contents; here only the classes of such a table are unpickled, so that a checkpoint from
elsewhere runs no code.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trainer import manifest
from trainer.manifest import CheckpointError

CONTENTS = ".metadata"
_CONTENTS_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "pathlib")


@dataclass(frozen=True)
class Kind:
    """Full shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Tensors(Mapping[str, Tensor]):
    """Full tensors of a checkpoint by name; each is read when asked for and not kept. No process group is needed.

    ``kinds`` has every name's shape and dtype without reading the tensor.
    """

    def __init__(self, folder: Path, *, under: str) -> None:
        self._under = f"{under}." if under else ""
        contents = read_contents(folder)
        self._reader = _Reader(folder, contents)
        every = kinds(contents)
        self.kinds = {name.removeprefix(self._under): every[name] for name in every if name.startswith(self._under)}

    def __getitem__(self, name: str) -> Tensor:
        kind = self.kinds[name]
        tensor = torch.empty(kind.shape, dtype=kind.dtype, device="cpu")
        with _quiet():
            dcp.load({self._under + name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)


def read_tensors(folder: Path, *, under: str = "") -> Tensors:
    """Open a checkpoint's tensors for one process, after comparing every file with its SHA-256.

    Args:
        folder: a ``step-…`` folder.
        under: only the names below this one, without it: ``model`` gives ``embed.weight`` for ``model.embed.weight``.

    Raises:
        CheckpointError: the checkpoint is not whole or is damaged.
    """
    facts = manifest.read(folder)
    facts.check_sums(folder, names=facts.files)
    return Tensors(folder, under=under)


def kinds(contents: Metadata) -> dict[str, Kind]:
    """Shape and dtype of every tensor that a table of contents lists, by name."""
    entries = contents.state_dict_metadata.items()
    return {
        name: Kind(tuple(e.size), e.properties.dtype) for name, e in entries if isinstance(e, TensorStorageMetadata)
    }


def read_contents(folder: Path) -> Metadata:
    """DCP's table of contents of a checkpoint.

    Raises:
        CheckpointError: it holds something else, which is not unpickled.
    """
    with (folder / CONTENTS).open("rb") as file:
        contents = _Unpickler(file).load()
    if not isinstance(contents, Metadata):
        raise CheckpointError(f"checkpoint file {folder / CONTENTS} is no table of contents of DCP")
    return contents


def save(folder: Path, tensors: dict[str, Tensor], *, alone: bool, late: Mapping[str, Tensor] | None = None) -> None:
    """Write tensors with DCP, fsynced; collective over all ranks unless ``alone``, and all ranks agree on a failure.

    A plain tensor that several ranks hold is written by one of them, so it must be the same on all.

    Args:
        folder: where to.
        tensors: by name.
        alone: whether this process is the only one.
        late: gives the values of tensors that lie on the meta device, one when its turn comes. Each tensor gets a file
            of its own then: DCP keeps what it has written until the file is closed.

    Raises:
        OSError: a rank could not write.
    """
    try:
        with _quiet():
            writer = _Writer(folder, single_file_per_rank=late is None)
            dcp.save(dict(tensors), storage_writer=writer, planner=_Planner(late or {}), no_dist=alone)
    except CheckpointException as error:
        raise _first_failure(error) from error


def load(folder: Path, tensors: dict[str, Tensor], *, contents: Metadata, alone: bool) -> None:
    """Read tensors in place with DCP, from whatever layout they were saved in; collective unless ``alone``.

    Raises:
        OSError: a rank could not read.
    """
    try:
        with _quiet():
            dcp.load(dict(tensors), storage_reader=_Reader(folder, contents), no_dist=alone)
    except CheckpointException as error:
        raise _first_failure(error) from error


class _Planner(DefaultSavePlanner):
    """DCP's planner, which asks for a tensor when it is about to be written."""

    def __init__(self, late: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._late = late

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._late[index.fqn] if index.fqn in self._late else super().lookup_object(index)


class _Writer(FileSystemWriter):
    """DCP's writer, with the operating system's error where ``torch.save`` would complain of positions in a file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause = error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


class _Reader(FileSystemReader):
    """DCP's reader over a table of contents that has been read."""

    def __init__(self, folder: Path, contents: Metadata) -> None:
        super().__init__(folder)
        self._contents = replace(contents, storage_meta=StorageMeta(load_id=self.load_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents."""
        return self._contents


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            found = getattr(torch, name)
            allowed = found is torch.Size or isinstance(found, torch.dtype)
        elif (module, name) == ("torch.serialization", "_get_layout"):  # how torch pickles torch.strided
            return super().find_class(module, name)
        elif (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle members of an Enum
            return _member
        else:
            found = super().find_class(module, name) if module in _CONTENTS_MODULES else None
            allowed = isinstance(found, type)
        if not allowed:
            raise CheckpointError(f"checkpoint file {CONTENTS} names {module}.{name}, which no table of contents needs")
        return found


def _member(kind: Any, name: str) -> Enum:
    """The member of an Enum that has a name; no other attribute of anything."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise CheckpointError(f"checkpoint file {CONTENTS} asks {kind} for {name}, which no table of contents needs")
    return kind[name]


def _first_failure(error: CheckpointException) -> BaseException:
    """The failure of the lowest rank that failed."""
    return error.failures[min(error.failures)][0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
