"""A decoder-only language model: embedding, blocks, norm, head."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.block import Block
from zoo.config import ModelConfig
from zoo.context import Context
from zoo.head import Head, Loss
from zoo.moe import MoE
from zoo.mtp import MTP
from zoo.norm import norm
from zoo.router import Router, Tally


@dataclass
class Objective:
    """What training asks of a forward: losses instead of logits.

    Attributes:
        targets: (B, T), the token after each; negative where none is to be predicted.
        mtp_tokens: (B, depths, T), the tokens 1, 2, … places ahead, for as many depths as are wanted.
        mtp_targets: (B, depths, T), the tokens 2, 3, … places ahead, negative where none is.
        rows: rows of the global batch, which divide the balance losses; None: evaluation.
        loss: sums the loss of states under the head's weight.
    """

    targets: Tensor
    mtp_tokens: Tensor
    mtp_targets: Tensor
    rows: Tensor | None
    loss: Loss


class Decoder(nn.Module):
    """Any architecture of the zoo. Constructors leave parameters empty: ``zoo.init`` or ``zoo.hf`` fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # of activations; None: that of the embedding
        self.embed = Embedding(vocab_size=config.vocab_size, d_model=config.d_model)
        learned = config.learned_positions
        self.positions = Embedding(vocab_size=config.context, d_model=config.d_model) if learned else None
        self.blocks = nn.ModuleDict({str(i): Block(layer, model=config) for i, layer in enumerate(config.layers)})
        self.norm = norm(config.d_model, config.norm)
        self.head = Head(config)
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.n_mtp))

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        objective: Objective | None = None,
    ) -> Tensor:
        """Logits, or losses.

        Args:
            tokens: (B, T) int64.
            positions: (B, T), counted from the start of each document, which None does.
            documents: (B, T), a number that differs between the documents of a row; None: one document.
            objective: what to predict; None: give logits.

        Returns:
            Logits (B, T, V); with an objective, (1 + depths,) summed losses: main, then each depth.

        Raises:
            ValueError: more tokens than learned positions.
        """
        if positions is None:
            if self.positions is not None and tokens.shape[1] > self.config.context:
                limit = f"at most model.context ({self.config.context})"
                raise ValueError(f"tokens of length {tokens.shape[1]}: must be {limit}, which has learned positions")
            positions = positions_within(tokens if documents is None else documents, split=documents is not None)
        x = self._embed(tokens)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        rows = None if objective is None else objective.rows
        context = Context(positions, documents, x.dtype, self.config.context, rows)
        for block in self.layers():
            x, tally = block(x, context)
            self._count(block.moe, tally)
        h = self.norm(x)
        if objective is None:
            return self.head(h, self.embed.weight)

        losses = [self.head(h, self.embed.weight, objective.targets, objective.loss)]
        for depth, mtp in enumerate(self.depths()[: objective.mtp_tokens.shape[1]]):
            h, tally = mtp(h, self._embed(objective.mtp_tokens[:, depth]), context)
            self._count(mtp.block.moe, tally)
            losses.append(self.head(h, self.embed.weight, objective.mtp_targets[:, depth], objective.loss))
        return torch.stack(losses)

    def layers(self) -> list[Block]:
        """Blocks in order; a pipeline stage has some of them."""
        return [cast(Block, block) for block in self.blocks.values()]

    def depths(self) -> list[MTP]:
        """Modules of multi-token prediction in order."""
        return [cast(MTP, mtp) for mtp in self.mtp]

    def routers(self) -> dict[str, Router]:
        """Routers by module name, in the order of layers."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Router)}

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        if self.config.scale_embed:
            x = x * torch.tensor(self.config.d_model**0.5, dtype=x.dtype)  # rounded: 33.94 is 34 in bf16 (Gemma 3 1B)
        return x

    def _count(self, moe: MoE | None, tally: Tally | None) -> None:
        if self.training and moe is not None and tally is not None:
            moe.router.tally(tally)


def positions_within(documents: Tensor, *, split: bool) -> Tensor:
    """Positions (B, T) counted from the start of each document, or of the row unless ``split``.

    Example: documents 7 7 7 4 4 give 0 1 2 0 1.
    """
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    if not split:
        return places
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - places.where(begins, 0).cummax(dim=1).values


class Embedding(nn.Module):
    """A vector for each token of the vocabulary, or for each position."""

    def __init__(self, *, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T) to (B, T, D)."""
        return _Embed.apply(tokens, self.weight)


class _Embed(torch.autograd.Function):
    """A lookup whose gradient adds up in at least fp32: torch's on a CPU adds a bf16 weight's in bf16.

    Of a token that occurs 4,096 times, that lost 72% of the gradient where a plan gathers weights in bf16.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.n_tokens, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        grad = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        return None, torch.ops.aten.embedding_dense_backward(grad, tokens, ctx.n_tokens, -1, False).to(ctx.dtype)
