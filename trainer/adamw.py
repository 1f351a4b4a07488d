"""AdamW whose moments are stored in bf16: half the optimizer's memory beside parameters in fp32.

DeepSeek-V3 keeps first and second moments in BF16, master weights and gradients in FP32 (arXiv 2412.19437, section
3.3.3). torch's fused AdamW wants one dtype for all of them, and its last numbers are rounded otherwise than those
before, so that cutting a tensor moves results.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.reduce import local

STORED = torch.bfloat16
CHUNK = 2**22
"""Numbers that are wide at one time; a row (of a bank: an expert) that has more is done at once."""


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW, arXiv 1711.05101; the update is made from moments as wide as parameters, which are then rounded to bf16.

    Rounding is to the nearest, ties to even. Each number is updated from its own gradient alone, in the same way
    wherever it lies: the same gradients give bitwise the same update under every plan.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        """Remember what to update.

        Args:
            groups: ``params``, and their ``weight_decay``.
            lr: learning rate.
            betas: how much of each moment stays.
            eps: added to the root of the second moment.
        """
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0})
        self.betas = betas
        self.eps = eps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update; no communication."""
        assert closure is None, "gradients are there"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    start_moments(self.state[parameter], parameter, dtype=STORED)
                    self._update(parameter, lr=group["lr"], weight_decay=group["weight_decay"])

    def _update(self, parameter: nn.Parameter, *, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        state["step"] += 1
        assert parameter.grad is not None
        # On the device, where a step count that is read would have the host wait.
        first, second = (1 - beta ** state["step"].double() for beta in self.betas)
        scale, root = (lr / first).to(parameter.dtype), second.sqrt().to(parameter.dtype)
        tensors = (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        beta1, beta2 = self.betas
        for p, g, m, v in _pieces([local(x) for x in tensors]):
            mean = m.to(p.dtype).lerp_(g, 1 - beta1)
            square = v.to(p.dtype).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            m.copy_(mean)
            v.copy_(square)
            p.mul_(1 - lr * weight_decay)
            p.sub_(mean.mul_(scale).div_(square.sqrt_().div_(root).add_(self.eps)))


def _pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape cut alike into runs of rows, of at most ``CHUNK`` numbers where a row has not more.

    Example: with ``CHUNK`` 4, five rows of two numbers are rows 0–1, 2–3 and 4.
    """
    shape = tensors[0].shape
    row = max(shape[1:].numel(), 1)
    return zip(*(x.split(max(CHUNK // row, 1)) for x in tensors), strict=True)


def start_moments(state: dict[str, Tensor], parameter: nn.Parameter, *, dtype: torch.dtype) -> None:
    """Make the moments that the first update has yet to make, of zeros, spread as the parameter."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False, dtype=dtype)
