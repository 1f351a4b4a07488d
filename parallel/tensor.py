"""Tensor parallelism with sequence parallelism: ranks of the axis tp share every layer and the tokens of the same rows.

Between layers a rank holds its T/tp tokens of each row. Before a mixer, a feed-forward and the head all tokens are
gathered; inside, the rank has some heads, hidden units or rows of the vocabulary (``parallel/plan.py``); what it gives
is a partial sum, which is added up while tokens are scattered again. So inside every rank's gradients are partial, and
between layers they are of its tokens: gradients of whole parameters are summed over tp, once an update
(``parallel/reduce.py``). Sources: Megatron-LM, arXiv 1909.08053, section 3; arXiv 2205.05198, section 4.2.2.

The classes here are a model's own with collectives around what they do; parameters keep their names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.comm import Lane, add, gather, join, mine, scatter
from parallel.layout import Place
from parallel.plan import Kind, find
from zoo.attention import Attention
from zoo.block import Block
from zoo.config_mixer import Scope
from zoo.context import Context
from zoo.decoder import Decoder, Embedding
from zoo.experts import Experts
from zoo.head import Head, Loss
from zoo.linear import Linear
from zoo.moe import MoE
from zoo.norm import RMSNorm, multiplier
from zoo.router import Tally


class SharedBlock(Block):
    """A layer between two gatherings of tokens (2 all-gathers and 2 reduce-scatters; as many in the backward)."""

    lane: Lane

    def _mix(self, h: Tensor, context: Context) -> Tensor:
        return scatter(super()._mix(gather(h, self.lane), context), self.lane)

    def _feed_forward(self, h: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        y, tally = super()._feed_forward(gather(h, self.lane), context)
        return scatter(y, self.lane), tally


class VocabEmbedding(Embedding):
    """Some rows of the vocabulary; tokens of the others are zeros here, and theirs on the rank that has them."""

    lane: Lane
    first: int

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T) to (B, T/tp, D) (one reduce-scatter over tp; backward one all-gather)."""
        place = tokens - self.first
        here = (place >= 0) & (place < self.weight.shape[0])
        x = super().forward(place.where(here, 0))
        return scatter(x.masked_fill(~here[..., None], 0.0), self.lane)


class OwnPositions(Embedding):
    """Learned positions of this rank's tokens."""

    lane: Lane

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T) to (B, T/tp, D); no communication."""
        return super().forward(mine(tokens, self.lane))


class VocabHead(Head):
    """Logits of some rows of the vocabulary; a loss adds up over ranks by itself, logits are put together."""

    lane: Lane
    vocab_size: int

    def forward(self, h: Tensor, embedding: Tensor, targets: Tensor | None = None, loss: Loss | None = None) -> Tensor:
        """As a ``Head``, of states (B, T/tp, D) (one all-gather over tp, another of logits; backward as ``gather``)."""
        result = super().forward(gather(h, self.lane), embedding, targets, loss)
        return result if targets is not None and loss is not None else join(result, self.lane, width=self.vocab_size)


class WidthNorm(RMSNorm):
    """The root mean square over heads of all ranks (OLMo 2).

    Attributes:
        width: of all heads together.
        copies: how many ranks have the same heads.
    """

    lane: Lane
    width: int
    copies: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, H/tp · K) (one all-reduce over tp, one in the backward, of a number a token)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        h = x.to(wide)
        squares = add(h.square().sum(-1, keepdim=True), self.lane)
        y = h * (squares / (self.width * self.copies) + self.eps).rsqrt()
        if self.late_cast:
            return (y * multiplier(self.weight, self.offset, x.dtype, wide)).to(x.dtype)
        return y.to(x.dtype) * multiplier(self.weight, self.offset, x.dtype, x.dtype)


def share_layers(model: Decoder, lane: Lane, *, places: Mapping[str, Place]) -> None:
    """Cut a model or a stage on the meta device to this rank's share under tensor parallelism, in place."""
    for name, module, leaf, parameter in list(_parameters(model)):
        of, shape = places[name].tp, list(parameter.shape)
        if of.dim is not None:
            shape[of.dim] = of.part.stop - of.part.start
        module.register_parameter(leaf, nn.Parameter(parameter.new_empty(shape)))
        if leaf == "bias" and isinstance(module, Linear) and find(name, config=model.config).kind is Kind.whole:
            module.adds_bias = lane.rank == 0
    for module in model.modules():
        if isinstance(module, Block):
            become(module, SharedBlock, lane=lane)
        elif isinstance(module, MoE):
            module.balance_share = 1 / lane.size
        elif isinstance(module, Experts):
            module.adds_bias = lane.rank == 0
        elif isinstance(module, Attention):
            _share_norms(module, lane)
    if model.embed is not None:
        become(model.embed, VocabEmbedding, lane=lane, first=places["embed.weight"].tp.part.start)
    if model.head is not None:
        become(model.head, VocabHead, lane=lane, vocab_size=model.config.vocab_size)
    if model.positions is not None:
        become(model.positions, OwnPositions, lane=lane)


def _share_norms(attention: Attention, lane: Lane) -> None:
    """Norms over the width of all queries or keys add up over ranks."""
    c = attention.config
    if c.qk_norm is None or c.qk_norm.scope is not Scope.width:
        return
    for norm, n_heads in ((attention.q_norm, c.n_heads), (attention.k_norm, c.n_kv_heads)):
        assert isinstance(norm, RMSNorm), f"{c.qk_norm=}"
        copies = max(1, lane.size // n_heads)
        become(norm, WidthNorm, lane=lane, width=n_heads * c.head_dim, copies=copies)


def become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Give a module the class that communicates, as FSDP2 does: it stays the same object with the same parameters."""
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Parameters by name, each with its module and what that calls it."""
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        yield name, model.get_submodule(path), leaf, parameter
