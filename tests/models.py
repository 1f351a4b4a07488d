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
from torch import Tensor

from zoo.config import ModelConfig
from zoo.decoder import Decoder

CONF = Path(__file__).parents[1] / "conf"
SHIPPED = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PUBLISHED = [name for name in SHIPPED if not name.endswith("_tiny")]


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
    composed = _composed(name)
    for key, value in changes.items():
        nested: Any = value
        for part in reversed(key.split("__")):
            nested = {part: nested}
        composed = cast(DictConfig, OmegaConf.merge(composed, {"model": nested}))
    root = OmegaConf.to_object(composed)
    assert isinstance(root, Root)
    return root.model


@cache
def _composed(name: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("only_a_model", overrides=[f"model={name}"])


def randomized(config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with every number random: matrices keep activations near one, norm weights and router biases vary."""
    torch.set_default_dtype(dtype)
    try:
        model = Decoder(config)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("balance_bias"):
                tensor.copy_(0.2 * draw(tensor))  # as wide as the sigmoid's spread: many choices turn on it
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.3 * draw(tensor))
            else:
                tensor.copy_(draw(tensor) * tensor.shape[-1] ** -0.5)
    return model
