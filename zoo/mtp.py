"""Multi-token prediction: one more layer a depth, each predicting one token further.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, wired as its released weights are: the embedding comes before
the hidden state (the paper's equation 21 writes them the other way), and the state that goes in is the one *after* the
final norm.
"""

import torch
from torch import Tensor, nn

from zoo.block import Block
from zoo.config import ModelConfig
from zoo.context import Context
from zoo.linear import Linear
from zoo.norm import norm
from zoo.router import Tally


class MTP(nn.Module):
    """Depth k: from the state of depth k−1 at position i and the token at i+k, predict the token at i+k+1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_norm = norm(config.d_model, config.norm)
        self.hidden_norm = norm(config.d_model, config.norm)
        self.proj = Linear(2 * config.d_model, config.d_model)
        self.block = Block(config.layers[-1], model=config)
        self.norm = norm(config.d_model, config.norm)

    def forward(self, h: Tensor, embedded: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        """One depth further.

        Args:
            h: (B, T, D), the normed state of the depth before.
            embedded: (B, T, D), embeddings of the tokens k places ahead.
            context: of the main model: a shift of all positions by k changes nothing under rotary positions.

        Returns:
            (B, T, D), normed: what the head reads and what the next depth goes on from; and what the router counted.
        """
        x = self.proj(torch.cat([self.embed_norm(embedded), self.hidden_norm(h)], dim=-1))
        x, tally = self.block(x, context)
        return self.norm(x), tally
