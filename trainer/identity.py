"""What makes a checkpoint this model's: its architecture without what only steers training, and its tokenizer."""

from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.manifest import CheckpointError
from zoo.config import ModelConfig, expanded

STEERING = {"init", "balance_loss", "switch_loss", "device_loss", "z_loss"}
"""What may change from one start to the next, as may ``balance_rate`` unless it is null."""


def identity(config: ModelConfig, *, tokenizer: str) -> dict[str, Any]:
    """As JSON, for comparison: of two ways to write the same layers down, neither is another model.

    Args:
        config: of the model.
        tokenizer: a fingerprint of the tokens' meaning.
    """
    model = without(expanded(config), STEERING)
    for layer in model["layers"]:
        if layer["moe"] is not None:  # null: there is no balancing bias in the checkpoint
            layer["moe"]["router"]["balance_rate"] = layer["moe"]["router"]["balance_rate"] is not None
    return {"model": model, "tokenizer": tokenizer}


def plain(config: ModelConfig) -> dict[str, Any]:
    """A config as JSON, which ``from_plain`` reads back."""
    return asdict(config)


def from_plain(values: dict[str, Any]) -> ModelConfig:
    """The config that ``plain`` wrote.

    Raises:
        CheckpointError: it was written by another version, or is of a model that is no longer built.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    except (OmegaConfBaseException, ValueError) as error:
        raise CheckpointError(f"the model in the checkpoint cannot be built: {str(error).splitlines()[0]}") from error
    assert isinstance(config, ModelConfig), f"{type(config)=}"
    return config


def without(values: Any, keys: set[str]) -> Any:
    """Nested dicts and lists less the given keys, at any depth."""
    if isinstance(values, dict):
        return {key: without(value, keys) for key, value in values.items() if key not in keys}
    if isinstance(values, list):
        return [without(value, keys) for value in values]
    return values
