"""Sampling, for looking at a model while it trains."""

from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.config import ModelConfig


class Model(Protocol):
    """What is sampled from: a decoder, or something that looks like one."""

    config: ModelConfig
    training: bool

    def __call__(self, tokens: Tensor, /) -> Any:
        """Logits (B, T, V) of tokens (B, T)."""

    def train(self, mode: bool = True) -> Any:
        """Make it count, or not, what routers choose."""


@torch.no_grad()
def generate(
    model: Model, *, prompt: list[int], n_tokens: int, device: torch.device, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """Continue a prompt, with the whole forward for every token: no cache, so that it is right for every architecture.

    Ranks that share the model must all call it alike (parameters over dp_shard).

    Args:
        model: any decoder.
        prompt: tokens to begin with, at least one.
        n_tokens: how many to add.
        device: of the model.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.

    Returns:
        The added tokens.
    """
    was_training = model.training
    model.train(False)
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(n_tokens):
        logits = model(tokens[:, -model.config.context :])[0, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(keepdim=True)
        tokens = torch.cat([tokens, chosen[None]], dim=1)
    model.train(was_training)
    return tokens[0, len(prompt) :].tolist()
