"""Attention that sharpens with the position of the query.

Sources: Llama 4, transformers modeling_llama4.py (arXiv 2501.19399); Grok 2.5, sglang's decode_attention.py.
"""

import math

import torch
from torch import Tensor

from zoo.config_mixer import TemperatureConfig, TemperatureKind


def sharpening(config: TemperatureConfig, positions: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What multiplies queries or scores at each position (B, T), in ``dtype``.

    Example, floor 4: under ``ratio`` positions 3, 4, 8, 16 give 1, 1, 1.5, 2; under ``steps`` with scale 0.1, positions
    2, 3, 7 give 1, 1 + 0.1 ln 2, 1 + 0.1 ln 3.
    """
    at = positions.to(dtype)
    if config.kind is TemperatureKind.steps:
        return torch.log1p(torch.floor((at + 1) / config.floor)) * config.scale + 1
    ratio = at.clamp(min=1).log() / math.log(config.floor)
    return torch.where(positions > config.floor, ratio, 1.0)
