"""Checkpoints to and from Hugging Face folders: ``python -m trainer.hf import|export FROM TO``."""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from trainer import manifest
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
from trainer.identity import identity, plain
from trainer.manifest import CheckpointError
from trainer.record import TOKENIZER
from trainer.start import stored_config
from trainer.stored import read_tensors
from zoo import hf
from zoo.hf_files import tokenizer_files


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the model of a ``step-…`` folder for transformers, with the tokenizer's files of its run.

    Raises:
        CheckpointError: the checkpoint is not whole.
        HFError: transformers has no class for the model, or the folder holds what no export writes.
    """
    config = stored_config(checkpoint)
    tensors = read_tensors(checkpoint, under="model")
    here = checkpoint.resolve()
    own = here / TOKENIZER  # of an imported checkpoint; that of a run lies beside its checkpoints
    files = sorted((own if own.is_dir() else here.parent.parent / TOKENIZER).glob("*"))
    tokens = manifest.read(checkpoint).progress.get("tokens", {})  # of an imported one
    hf.write(config, tensors.__getitem__, folder=folder, tokenizer=files, replace=True, **tokens)


def import_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Write the model of a Hugging Face folder as a checkpoint without optimizer, for ``checkpoint.init``.

    Its tokenizer's files and the tokens that begin and end a text go into the checkpoint, from where an export takes
    them along.

    Raises:
        CheckpointError: ``checkpoint`` is no name of one, is there already, or cannot be written.
        HFError: the folder is damaged or holds what the zoo does not build.
    """
    match = re.fullmatch(r"step-(\d{8,})", checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint}: the name must be step- and eight digits, such as step-00000000")
    if checkpoint.exists() or checkpoint.is_symlink():
        raise CheckpointError(f"{checkpoint}: exists: must be a new folder")
    config = hf.read_config(folder)
    progress = {"model": plain(config), "tokens": hf.token_ids(folder)}
    files = {f"{TOKENIZER}/{file.name}": file for file in tokenizer_files(folder)}
    tensors = hf.tensors(folder, config=config)
    state = {"model": {name: tensors.empty(name) for name in tensors}}
    settings = CheckpointConfig(every=0, keep=0, resume="never", init=None)
    about = identity(config, tokenizer="")
    writer = Checkpoints(checkpoint.parent, config=settings, rank=0, world_size=1, about=about)
    writer.save(int(match[1]), state, progress=progress, late=_Under("model", tensors), files=files)


class _Under(Mapping[str, Tensor]):
    """Tensors by names below another."""

    def __init__(self, top: str, tensors: Mapping[str, Tensor]) -> None:
        self._top = f"{top}."
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name.removeprefix(self._top)]

    def __contains__(self, name: object) -> bool:  # without reading it
        return isinstance(name, str) and name.removeprefix(self._top) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (self._top + name for name in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.hf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="Hugging Face folder to checkpoint")
    into.add_argument("folder", type=Path, metavar="HF_FOLDER")
    into.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step-00000000 folder to make")
    out = commands.add_parser("export", help="checkpoint to Hugging Face folder")
    out.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step-… folder")
    out.add_argument("folder", type=Path, metavar="HF_FOLDER")
    given = parser.parse_args(arguments)
    try:
        if given.command == "export":
            export_checkpoint(given.checkpoint, given.folder)
        else:
            import_checkpoint(given.folder, given.checkpoint)
    except (CheckpointError, hf.HFError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.folder if given.command == "export" else given.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
