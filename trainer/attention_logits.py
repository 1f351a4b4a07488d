"""The largest attention logits of an update: of each layer and head, over the whole global batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context_kernels import own_heads
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from zoo.attention import Attention
from zoo.config import BlockConfig, ModelConfig
from zoo.decoder import Decoder
from zoo.mla import MLA


@dataclass
class Meter:
    """Measures while a model trains; kernels keep what they have seen until it is read.

    Attributes:
        model: whose kernels.
        mesh: over which they see heads, tokens and rows.
    """

    model: Decoder | Pipeline
    mesh: Mesh

    def __post_init__(self) -> None:
        """Begin; no communication."""
        dtype = torch.promote_types(self.model.compute_dtype or torch.float32, torch.float32)
        for _, mixer in mixers(self.model):
            mixer.kernel.measure(n_heads=len(self._heads(mixer)), dtype=dtype, device=self.mesh.device)

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """What was largest since the last reading, (H,) a layer by its name, the same on every rank; begin anew.

        One all-reduce over tp and one over pp, dp and cp, of a number a head.
        """
        layers, mine = attending(self.model.config), dict(mixers(self.model))
        most = max(n for _, n in layers.values())
        every = torch.full((len(layers), most), -torch.inf, dtype=torch.float64, device=self.mesh.device)
        for i, name in enumerate(layers):
            if name in mine:
                heads, top = self._heads(mine[name]), mine[name].kernel.top
                assert top is not None
                every[i, heads.start : heads.stop] = top
                top.fill_(-torch.inf)
        for axis in ("tp", "losses"):
            if (group := self.mesh.group(axis)) is not None:
                dist.all_reduce(every, op=dist.ReduceOp.MAX, group=group)
        return {name: row[:n] for (name, (_, n)), row in zip(layers.items(), every, strict=True)}

    def _heads(self, mixer: Attention | MLA) -> range:
        return own_heads(mixer.kernel, n_heads=mixer.config.n_heads, tp=self.mesh.lane("tp"))


def mixers(model: Decoder | Pipeline) -> Iterator[tuple[str, Attention | MLA]]:
    """What attends on this rank by the name of its layer in the whole model, such as blocks.3 or mtp.0.block."""
    for stage in model.parts() if isinstance(model, Pipeline) else [model]:
        for name, module in stage.named_modules():
            if isinstance(module, Attention | MLA):
                yield name.removesuffix(".mixer"), module


def attending(config: ModelConfig) -> dict[str, tuple[BlockConfig, int]]:
    """Layers of a whole model that attend, by name, in order: each one's config and number of query heads."""
    named = {f"blocks.{i}": layer for i, layer in enumerate(config.layers)}
    named |= {f"mtp.{k}.block": config.layers[-1] for k in range(config.n_mtp)}
    found = {}
    for name, layer in named.items():
        part = layer.attention if layer.attention is not None else layer.mla
        if part is not None:
            found[name] = layer, part.n_heads
    return found


def by_layer(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Largest logit of each layer, under the keys that ``metrics.jsonl`` has for them."""
    return {f"max_attention_logit/{name}": heads.amax() for name, heads in logits.items()}


def largest(logits: Mapping[str, Tensor]) -> Tensor:
    """Of all layers and heads."""
    return torch.stack([heads.amax() for heads in logits.values()]).amax()
