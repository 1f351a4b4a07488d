"""One layer: norm, mixer, residual; norm, feed-forward, residual."""

from torch import Tensor, nn

from zoo.attention import Attention
from zoo.config import BlockConfig, ModelConfig
from zoo.context import Context
from zoo.mla import MLA
from zoo.mlp import MLP
from zoo.moe import MoE
from zoo.norm import RMSNorm
from zoo.router import Tally


class Block(nn.Module):
    """A mixer, then an mlp or a moe, each behind a norm and added to the residual stream."""

    def __init__(self, config: BlockConfig, *, model: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(model.d_model, model.norm)
        self.mixer = mixer(config, model=model)
        self.ff_norm = RMSNorm(model.d_model, model.norm)
        self.mlp = MLP(d_model=model.d_model, d_ff=config.mlp.d_ff) if config.mlp else None
        self.moe = MoE(config.moe, d_model=model.d_model) if config.moe else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        """Map (B, T, D) to (B, T, D), with what its router counted."""
        tally = None
        x = x + self.mixer(self.mixer_norm(x), context)
        h = self.ff_norm(x)
        if self.mlp is not None:
            x = x + self.mlp(h)
        if self.moe is not None:
            y, tally = self.moe(h, context)
            x = x + y
        return x, tally


def mixer(config: BlockConfig, *, model: ModelConfig) -> Attention | MLA:
    """What mixes tokens in this kind of layer."""
    if config.mla is not None:
        return MLA(config.mla, d_model=model.d_model, context=model.context)
    assert config.attention is not None, f"{config=}"
    return Attention(config.attention, d_model=model.d_model)
