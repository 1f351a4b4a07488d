"""AdamW over the parameters of a spread model, and its state by name."""

import torch
from torch import Tensor, nn

from trainer.config import OptimConfig


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (norm weights) do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Moments and step counts by parameter name: the live tensors, so that a checkpoint is read into them.

    State that the first update has yet to make is made here, as zeros.
    """
    for parameter in model.parameters():
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
