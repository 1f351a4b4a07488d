"""Sampling, for looking at a model while it trains."""

import torch

from zoo.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder, *, prompt: list[int], n_tokens: int, device: torch.device, temperature: float = 0.0, seed: int = 0
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
    model.eval()
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
