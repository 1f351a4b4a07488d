"""What makes a checkpoint this model's: its architecture without what only steers training, and its tokenizer."""

from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf

from zoo.config import ModelConfig

STEERING = {"init_std", "balance_rate", "balance_loss"}  # may change from one start to the next


def identity(config: ModelConfig, *, tokenizer: str) -> dict[str, Any]:
    """As JSON, for comparison.

    Args:
        config: of the model.
        tokenizer: a fingerprint of the tokens' meaning.
    """
    return {"model": without(plain(config), STEERING), "tokenizer": tokenizer}


def plain(config: ModelConfig) -> dict[str, Any]:
    """A config as JSON, which ``from_plain`` reads back."""
    return asdict(config)


def from_plain(values: dict[str, Any]) -> ModelConfig:
    """The config that ``plain`` wrote."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    assert isinstance(config, ModelConfig), f"{type(config)=}"
    return config


def without(values: Any, keys: set[str]) -> Any:
    """Nested dicts less the given keys, at any depth."""
    if isinstance(values, dict):
        return {key: without(value, keys) for key, value in values.items() if key not in keys}
    return values
