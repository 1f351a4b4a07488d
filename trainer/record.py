"""What a run's folder says of the run beside its results."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

RUN = "run.yaml"
TOKENIZER = "tokenizer"  # folder of the tokenizer's files, which an export carries along


def record(folder: Path, *, settings: dict[str, Any], tokenizer: Sequence[Path], rank: int) -> None:
    """Write the resolved run and copy the tokenizer's files; rank 0 only."""
    if rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(settings), folder / RUN)
    (folder / TOKENIZER).mkdir(exist_ok=True)
    for file in tokenizer:
        shutil.copy(file, folder / TOKENIZER)
