"""One layer: a mixer, then a feed-forward, each added to the residual stream."""

from torch import Tensor, nn

from zoo.attention import Attention
from zoo.config import BlockConfig, ModelConfig
from zoo.context import Context
from zoo.deltanet import DeltaNet
from zoo.mla import MLA
from zoo.mlp import MLP
from zoo.moe import MoE
from zoo.norm import norm
from zoo.router import Tally


class Block(nn.Module):
    """A mixer, then an mlp, a moe or both side by side, with norms before, after or on both sides of each."""

    def __init__(self, config: BlockConfig, *, model: ModelConfig) -> None:
        super().__init__()
        self.ff_scale = config.ff_scale
        self.mixer_norm = norm(model.d_model, model.norm) if config.pre_norm else None
        self.mixer = mixer(config, model=model)
        self.mixer_post_norm = norm(model.d_model, model.norm) if config.post_norm else None
        self.ff_norm = norm(model.d_model, model.norm) if config.pre_norm else None
        self.mlp = MLP(config.mlp, d_model=model.d_model) if config.mlp else None
        self.moe = MoE(config.moe, d_model=model.d_model) if config.moe else None
        self.ff_post_norm = norm(model.d_model, model.norm) if config.post_norm else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        """Map (B, T, D) to (B, T, D), with what its router counted."""
        return self.fed(self.mixed(x, context), context)

    def mixed(self, x: Tensor, context: Context) -> Tensor:
        """The first half: (B, T, D) and what its tokens see of each other."""
        y = self._mix(_through(self.mixer_norm, x), context)
        return x + _through(self.mixer_post_norm, y)

    def fed(self, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        """The second half: (B, T, D) and what each token becomes, with what the router counted."""
        y, tally = self._feed_forward(_through(self.ff_norm, x), context)
        return x + _through(self.ff_post_norm, y), tally

    def _mix(self, h: Tensor, context: Context) -> Tensor:
        y: Tensor = self.mixer(h, context)
        return y

    def _feed_forward(self, h: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        y, tally = (None, None) if self.moe is None else self.moe(h, context)
        if self.mlp is not None:
            y = self.mlp(h) if y is None else self.mlp(h) + y
        assert y is not None, "a block has an mlp or a moe"
        return y if self.ff_scale == 1 else y * self.ff_scale, tally


def mixer(config: BlockConfig, *, model: ModelConfig) -> Attention | MLA | DeltaNet:
    """What mixes tokens in this kind of layer."""
    if config.mla is not None:
        return MLA(config.mla, d_model=model.d_model, context=model.context)
    if config.deltanet is not None:
        return DeltaNet(config.deltanet, d_model=model.d_model)
    assert config.attention is not None, f"{config=}"
    return Attention(config.attention, d_model=model.d_model)


def _through(part: nn.Module | None, x: Tensor) -> Tensor:
    return x if part is None else part(x)
