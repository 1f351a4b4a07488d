"""Feed-forward layers."""

from torch import Tensor, nn

from zoo.activation import GATED, activate
from zoo.config_ff import MLPConfig
from zoo.linear import Linear


class MLP(nn.Module):
    """``down(activate(gate x, up x))``, arXiv 2002.05202; without a gate ``down(activate(up x))`` (GPT-2)."""

    def __init__(self, config: MLPConfig, *, d_model: int) -> None:
        super().__init__()
        self.activation = config.activation
        gated = config.activation in GATED
        self.gate = Linear(d_model, config.d_ff, bias=config.bias) if gated else None
        self.up = Linear(d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        gate = None if self.gate is None else self.gate(x)
        return self.down(activate(gate, self.up(x), self.activation))
