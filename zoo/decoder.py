"""A decoder-only language model: embedding, blocks, norm, head."""

from dataclasses import dataclass
from typing import Any, Self, cast

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
        mtp_loss: the same where multi-token modules give the states; None: ``loss``.
    """

    targets: Tensor
    mtp_tokens: Tensor
    mtp_targets: Tensor
    rows: Tensor | None
    loss: Loss
    mtp_loss: Loss | None = None


@dataclass(frozen=True)
class Part:
    """Which part of a model a pipeline stage has: some blocks, what stands before them, and what stands after them.

    Example: of three layers in two stages, the first has embedding and two: 0, 2, begins; the second 2, 3, ends.

    Attributes:
        first: its first block.
        stop: one past its last block.
        begins: it has the embedding: tokens come in.
        ends: it has norm, head and multi-token modules: logits or losses come out.
    """

    first: int
    stop: int
    begins: bool
    ends: bool

    @classmethod
    def whole(cls, config: ModelConfig) -> Self:
        """All of a model."""
        return cls(0, config.n_layers, begins=True, ends=True)

    def embeds(self, config: ModelConfig) -> bool:
        """Whether it has the embedding, or a copy of it: a tied head and multi-token modules read it too."""
        return self.begins or (self.ends and (config.tied or config.n_mtp > 0))


class Decoder(nn.Module):
    """Any architecture of the zoo. Constructors leave parameters empty: ``zoo.init`` or ``zoo.hf`` fills them.

    A pipeline stage is one too: parts that it lacks are None, blocks keep their numbers in the whole model.
    """

    def __init__(self, config: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        self.config = config
        self.part = part = Part.whole(config) if part is None else part
        self.compute_dtype: torch.dtype | None = None  # of activations; None: that of the embedding
        embeds, learned = part.embeds(config), config.learned_positions and part.begins
        self.embed = Embedding(vocab_size=config.vocab_size, d_model=config.d_model) if embeds else None
        self.positions = Embedding(vocab_size=config.context, d_model=config.d_model) if learned else None
        layers = config.layers
        self.blocks = nn.ModuleDict({str(i): Block(layers[i], model=config) for i in range(part.first, part.stop)})
        self.norm = norm(config.d_model, config.norm) if part.ends else None
        self.head = Head(config) if part.ends else None
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.n_mtp if part.ends else 0))

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        objective: Objective | None = None,
    ) -> Tensor:
        """Logits, or losses; of a stage that does not end the model, states.

        Args:
            tokens: (B, T) int64; of a stage that does not begin the model, states (B, T, D) of the one before.
            positions: (B, T), counted from the start of each document, which None does where the model begins.
            documents: (B, T), a number that differs between the documents of a row; None: one document.
            objective: what to predict; None: give logits.

        Returns:
            Logits (B, T, V); with an objective, (1 + depths,) summed losses: main, then each depth.

        Raises:
            ValueError: more tokens than learned positions.
        """
        x = tokens
        if self.part.begins:
            tokens, positions, documents = self.fitted(tokens, positions, documents)
            x = self._begin(tokens, positions)
        assert positions is not None, "only a stage that begins the model counts them by itself"
        context = self._context(positions, documents, x.dtype, None if objective is None else objective.rows)
        for block in self.layers():
            x, tally = block(x, context)
            self._count(block.moe, tally)
        return self._end(x, context, objective) if self.part.ends else x

    def fitted(
        self, tokens: Tensor, positions: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows as all stages take them: with positions; where ranks share their tokens, of a length that allows it.

        Raises:
            ValueError: more tokens than learned positions.
        """
        if positions is None:
            if self.config.learned_positions and tokens.shape[1] > self.config.context:
                limit = f"at most model.context ({self.config.context})"
                raise ValueError(f"tokens of length {tokens.shape[1]}: must be {limit}, which has learned positions")
            positions = positions_within(tokens if documents is None else documents, split=documents is not None)
        return tokens, positions, documents

    def states(self, rows: int, length: int) -> torch.Size:
        """Shape of what one stage gives the next, for ``rows`` fitted rows: (B, T, D), or less of T on each rank."""
        return torch.Size((rows, length, self.config.d_model))

    def layers(self) -> list[Block]:
        """Blocks in order; a pipeline stage has some of them."""
        return [cast(Block, block) for block in self.blocks.values()]

    def depths(self) -> list[MTP]:
        """Modules of multi-token prediction in order."""
        return [cast(MTP, mtp) for mtp in self.mtp]

    def routers(self) -> dict[str, Router]:
        """Routers by module name, in the order of layers."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Router)}

    def _own(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Of something of each token of whole rows, what this rank computes with: all; ranks may share rows."""
        return x

    def _context(self, positions: Tensor, documents: Tensor | None, dtype: torch.dtype, rows: Tensor | None) -> Context:
        """What layers share, of whole rows."""
        return Context(positions, documents, dtype, self.config.context, rows)

    def _begin(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The first states, of whole rows (B, T)."""
        x = self._embed(tokens)
        return x if self.positions is None else x + self.positions(self._own(positions)).to(x.dtype)

    def _end(self, x: Tensor, context: Context, objective: Objective | None) -> Tensor:
        """Logits or losses from the last states."""
        assert self.norm is not None and self.head is not None, f"{self.part=}"
        matrix = self.head.weight if self.embed is None else self.embed.weight
        assert matrix is not None, f"{self.part=}"
        h = self.norm(x)
        if objective is None:
            logits: Tensor = self.head(h, matrix)
            return logits
        losses = [self.head(h, matrix, self._own(objective.targets), objective.loss)]
        further = objective.loss if objective.mtp_loss is None else objective.mtp_loss
        for depth, mtp in enumerate(self.depths()[: objective.mtp_tokens.shape[1]]):
            h, tally = mtp(h, self._embed(objective.mtp_tokens[:, depth]), context)
            self._count(mtp.block.moe, tally)
            losses.append(self.head(h, matrix, self._own(objective.mtp_targets[:, depth]), further))
        return torch.stack(losses)

    def _embed(self, tokens: Tensor) -> Tensor:
        """States of this rank's tokens, of whole rows (B, T)."""
        assert self.embed is not None, f"{self.part=}"
        x: Tensor = self.embed(self._own(tokens))
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
