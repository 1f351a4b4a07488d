"""Where a run starts: from drawn weights, from the weights of a folder, or where a checkpoint left off."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from parallel.apply import fill, fill_fresh
from parallel.pipeline import Pipeline
from parallel.reduce import views
from trainer import manifest
from trainer.checkpoint import Checkpoints
from trainer.engine import TorchEngine
from trainer.identity import from_plain, identity, without
from trainer.manifest import CheckpointError
from trainer.state import State
from trainer.stored import read_tensors
from trainer.stream import Stream
from zoo import hf
from zoo.config import ModelConfig
from zoo.decoder import Decoder

log = logging.getLogger(__name__)


def start(engine: TorchEngine, *, checkpoints: Checkpoints, stream: Stream, seed: int) -> State:
    """Give model, optimizer and stream their values, as ``checkpoint.resume`` and ``checkpoint.init`` say (all axes).

    Raises:
        CheckpointError: a checkpoint is damaged or holds another model.
        HFError: a Hugging Face folder does, or is none.
    """
    progress = checkpoints.restore(engine.state())
    init = checkpoints.config.init
    if progress is not None:
        engine.filled()
        if init is not None and engine.mesh.rank == 0:
            log.warning("checkpoint.init=%s: passed over, this run goes on from its own checkpoint", init)
        stream.load_state_dict(progress["stream"])
        return State.from_plain(progress["state"])
    if init is None:
        fill_fresh(engine.model, seed=seed)
    else:
        fill_from(engine.model, Path(init))
    engine.filled()
    return State()


def fill_from(model: Decoder | Pipeline, folder: Path) -> None:
    """Set all weights, and routers' biases, from a ``step-…`` or Hugging Face folder.

    Raises:
        CheckpointError: the folder is damaged, is neither, or holds another model.
        HFError: the Hugging Face folder is damaged or holds what the zoo does not build.
    """
    stored: Mapping[str, Tensor]
    if (folder / manifest.NAME).is_file():
        _check_same(folder, model.config, stored_config(folder))
        stored = read_tensors(folder, under="model")
    elif (folder / hf.CONFIG).is_file():
        config = hf.read_config(folder)
        _check_same(folder, model.config, config)
        stored = hf.tensors(folder, config=config)
    else:
        raise CheckpointError(
            f"checkpoint.init={folder}: must be a step-… folder (with {manifest.NAME}) or a Hugging Face folder (with "
            f"{hf.CONFIG})"
        )

    def value(name: str, shape: torch.Size) -> Tensor:
        return stored[name]

    fill(views(model, model.state_dict()), value)


def stored_config(folder: Path) -> ModelConfig:
    """The whole config of the model in a ``step-…`` folder.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
    """
    return from_plain(manifest.read(folder).progress["model"])


def _check_same(folder: Path, wanted: ModelConfig, found: ModelConfig) -> None:
    """Weights mean something under their own architecture; positions may change, as extending a context does."""
    ours, theirs = (identity(config, tokenizer="")["model"] for config in (wanted, found))
    positions = {"context", "rope"}
    difference = manifest.first_difference(without(theirs, positions), without(ours, positions), key="model")
    if difference is not None:
        raise CheckpointError(f"checkpoint.init={folder}: holds another model: {difference}")
    moved = manifest.first_difference(theirs, ours, key="model")
    if moved is not None:
        log.warning("checkpoint.init=%s: its weights go on under other positions: %s", folder, moved)
