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
from zoo.mask import Mask
from zoo.moe import MoE
from zoo.mtp import MTP
from zoo.norm import RMSNorm
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
        self.blocks = nn.ModuleDict({str(i): Block(layer, model=config) for i, layer in enumerate(config.layers)})
        self.norm = RMSNorm(config.d_model, config.norm)
        self.head = Head(d_model=config.d_model, vocab_size=config.vocab_size, tied=config.tied)
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
            positions: (B, T), counted from the start of each document; None: from the start of the row.
            documents: (B, T), a number that differs between the documents of a row; None: one document.
            objective: what to predict; None: give logits.

        Returns:
            Logits (B, T, V); with an objective, (1 + depths,) summed losses: main, then each depth.
        """
        x = self._embed(tokens)
        context = self._context(tokens, positions, documents, x.dtype, None if objective is None else objective.rows)
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
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def _context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        dtype: torch.dtype,
        rows: Tensor | None,
    ) -> Context:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return Context(positions, Mask(documents), dtype, self.config.context, rows)

    def _count(self, moe: MoE | None, tally: Tally | None) -> None:
        if self.training and moe is not None and tally is not None:
            moe.router.tally(tally)


class Embedding(nn.Module):
    """A vector for each token of the vocabulary."""

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
