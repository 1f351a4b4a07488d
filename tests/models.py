"""The shipped architectures, composed as ``train.py`` composes them: ``from models import SHIPPED, compose``."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from zoo.config import BlockConfig, ModelConfig
from zoo.config_ff import Activation
from zoo.decoder import Decoder

CONF = Path(__file__).parents[1] / "conf"
SHIPPED = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if not path.stem.endswith("_standin"))
PUBLISHED = [name for name in SHIPPED if not name.endswith("_tiny")]


RESIDUAL = 0.3
"""Scale of what adds to the residual stream; at 1, rounding grows so much from layer to layer that of 60 random models
of a family up to 3 are too noisy to compare in fp32."""


@dataclass
class Root:
    """A run that is nothing but a model."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"model": MISSING}])
    model: ModelConfig = MISSING


ConfigStore.instance().store(name="only_a_model", node=Root)


def compose(name: str, **changes: object) -> ModelConfig:
    """The model ``name`` with some values changed or slots filled, as a YAML that inherits it would do it.

    ``compose("llama3_tiny", d_model=64, blocks__dense__mlp__d_ff=128)``: two underscores stand for a dot.
    """
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    root = OmegaConf.to_object(cast(DictConfig, OmegaConf.merge(_composed(name), {"model": nested})))
    assert isinstance(root, Root)
    return root.model


@cache
def _composed(name: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("only_a_model", overrides=[f"model={name}"])


def randomized(config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with every number random: matrices keep activations near one, everything else varies."""
    torch.set_default_dtype(dtype)
    try:
        model = Decoder(config)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            mean, spread = _spread(config, name, tensor.shape)
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(mean + spread * drawn)
    return model


def _spread(config: ModelConfig, name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of what a tensor is filled with."""
    *_, module, last = name.split(".")
    if last == "balance_bias":
        return 0, 0.2  # as wide as the sigmoid's spread: many choices turn on it
    if last in ("sinks", "dt_bias"):
        return 0, 1
    if last == "log_decay":
        return -3, 1.5  # half of a state is left after 2 tokens in some heads, after 100 in others
    if last == "bias" or last.endswith("_bias"):
        return 0, 0.3
    if module.endswith("post_norm"):
        return RESIDUAL - _offset(config, name), 0.3 * RESIDUAL
    if module.endswith("norm"):
        return 1 - _offset(config, name), 0.3
    if name.endswith(".mixer.wo.weight") and _layer(config, name).deltanet is not None:
        return 0, 0.1 * shape[-1] ** -0.5  # the norm before it divides by a length that may be small: rounding
    moe = _layer(config, name).moe if module == "experts" else None
    if moe is not None and moe.activation is Activation.swiglu_clamped:
        return 0, (0.1 if last == "down" else 4) * shape[-1] ** -0.5  # some reach the clamps at 7
    if module in ("wo", "down") or last == "down":
        return 0, RESIDUAL * shape[-1] ** -0.5
    return 0, shape[-1] ** -0.5


def _offset(config: ModelConfig, name: str) -> float:
    """What a norm adds to its stored weight."""
    if ".mixer." not in name:
        return config.norm.offset
    attention = _layer(config, name).attention
    return 0.0 if attention is None or attention.qk_norm is None else attention.qk_norm.offset


def _layer(config: ModelConfig, name: str) -> BlockConfig:
    """The config of the layer that a parameter belongs to."""
    place, number, *_ = name.split(".")
    return config.layers[int(number) if place == "blocks" else -1]
