"""What a preparation has finished so far, and whether another may continue it."""

import base64
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import LOCK, PARTIAL, write_whole, writing
from data.install import FILES
from data.manifest import DTYPES, FORMAT, NAME, SPLITS, Settings, ShardEntry, Split
from data.shard import check_size, file_sizes, files

PROGRESS = "progress.json"


@dataclass
class Progress:
    """Finished segments. ``n_documents`` of the source are done; ``counts`` holds how often each token occurs."""

    settings: Settings
    shards: dict[str, list[ShardEntry]]
    n_documents: int
    counts: np.ndarray

    def save(self, folder: Path) -> None:
        """Replace the file in ``folder``; what it lists is on the disk by now."""
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "n_documents": self.n_documents,
            "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
            "counts": base64.b64encode(zlib.compress(self.counts.astype("<i8").tobytes())).decode(),
        }
        write_whole(folder / PROGRESS, content=(json.dumps(content, indent=1) + "\n").encode())


def begin(folder: Path, *, settings: Settings) -> Progress:
    """Start in a folder that holds nothing of anybody's.

    Raises:
        DataError: The folder holds other files.
    """
    others = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not path.name.endswith(PARTIAL))
    if others:
        raise DataError(f"out={folder}: must be new or empty: it holds {others[0]}")
    progress = Progress(settings=settings, shards={split: [] for split in SPLITS}, n_documents=0, counts=np.zeros(0))
    progress.save(folder)
    return progress


def read_progress(folder: Path) -> Progress | None:
    """What an unfinished preparation left, or nothing.

    Raises:
        DataError: The file is damaged or of another format.
    """
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        counts = np.frombuffer(zlib.decompress(base64.b64decode(content["counts"])), dtype="<i8").astype(np.int64)
        shards = {split: [ShardEntry(**shard) for shard in content["shards"][split]] for split in SPLITS}
        settings, n_documents, version = content["settings"], content["n_documents"], content["format"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise DataError(f"{path}: is damaged; remove the folder and prepare it anew") from error
    if version != FORMAT:
        raise DataError(f"{path}: format={version}: must be {FORMAT}; remove the folder and prepare it anew")
    return Progress(settings=settings, shards=shards, n_documents=n_documents, counts=counts)


def check_same(found: Settings, *, asked: Settings, folder: Path) -> None:
    """Check that what ``folder`` was prepared with is what is asked for.

    Raises:
        DataError: It is not; names the first setting that differs.
    """
    for key in {**found, **asked}:
        if found.get(key) != asked.get(key):
            raise DataError(
                f"{key}={asked.get(key)}: must be {found.get(key)}, with which {folder} was prepared; "
                "give that, choose another folder or remove this one"
            )


def check_files(folder: Path, *, splits: dict[str, list[ShardEntry]] | dict[str, Split], dtype: str) -> None:
    """Check that every finished shard is there and has its size.

    Raises:
        DataError: One is missing or truncated.
    """
    for split in splits.values():
        for shard in split.shards if isinstance(split, Split) else split:
            sizes = file_sizes(n_tokens=shard.tokens, n_documents=shard.documents, dtype=DTYPES[dtype])
            for file, size in zip(files(folder / shard.name), sizes, strict=True):
                check_size(file, expected=size)


def clean(folder: Path) -> None:
    """Remove what a killed preparation was writing."""
    for path in folder.glob(f"*{PARTIAL}"):
        with writing(path):
            path.unlink()


def clear(folder: Path) -> None:
    """Remove a preparation, the manifest first, so that what is left is never taken for whole; other files stay."""
    ours = [
        NAME,
        PROGRESS,
        "train-*",
        "validation-*",
        *(f"{name}*" for name in FILES.values()),
        "tokenizer_config.json",
    ]
    for pattern in ours:
        for path in folder.glob(pattern):
            with writing(path):
                path.unlink()
