"""Cross-entropy of the next token without logits of all tokens at once."""

import torch
from torch import Tensor


def cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
    """Summed cross-entropy in nats, with gradients made chunk by chunk while each chunk's logits exist.

    Args:
        h: (N, D), states.
        weight: (V, D), of the head.
        targets: (N,), negative where nothing is to be predicted.
        chunk: how many tokens have logits at one time.

    Returns:
        A scalar in at least fp32.
    """
    return _CrossEntropy.apply(h, weight, targets, chunk, torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    """The gradient of the sum is made in the forward and scaled in the backward: logits never outlive their chunk."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, h: Tensor, weight: Tensor, targets: Tensor, chunk: int, training: bool
    ) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        matrix = weight.to(h.dtype)
        result = torch.zeros((), dtype=wide, device=h.device)
        if training:
            d_h = torch.empty_like(h)
            d_weight = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, wide), device=h.device)
        for start in range(0, h.shape[0], chunk):
            part, target = h[start : start + chunk], targets[start : start + chunk]
            counted = target >= 0
            index = target.clamp(min=0)[:, None]
            logs = torch.log_softmax((part @ matrix.t()).to(wide), dim=-1)  # (chunk, V)
            result -= logs.gather(1, index)[:, 0].where(counted, 0.0).sum()
            if training:
                d_logits = logs.exp_()  # in place: softmax, then less one at the target
                d_logits.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=wide))
                d_logits.mul_(counted[:, None])
                d_logits = d_logits.to(h.dtype)
                torch.mm(d_logits, matrix, out=d_h[start : start + chunk])
                d_weight += d_logits.t() @ part
        if training:
            ctx.save_for_backward(d_h, d_weight)
            ctx.weight_dtype = weight.dtype
        return result

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_h, d_weight = ctx.saved_tensors
        return d_h * grads[0].to(d_h.dtype), (d_weight * grads[0]).to(ctx.weight_dtype), None, None, None
