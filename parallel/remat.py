"""Activation checkpointing: a block keeps its input, and what else it held for the backward is computed again there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.config import Remat
from zoo import expert_loop  # noqa: F401  registers zoo::expert_loop
from zoo.block import Block
from zoo.context import Context
from zoo.router import Tally

BlockForward = Callable[[Block, Tensor, Context], tuple[Tensor, Tally | None]]

KEPT = (
    "aten::mm",  # what Linear is made of, and the router
    "aten::addmm",
    "aten::_grouped_mm",  # experts, in one kernel
    "zoo::expert_loop",  # experts, one after another: their three products
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
    "parallel::ring",
    "zoo::largest_logits",  # a number a head
    "flex_attention",  # an operator over a function, which has no namespace
)
"""Operators whose results ``selective`` keeps, by name: products of activations with weights, and fused attention.

Batched products are not among them. What makes them writes over their results (``plain`` attention: scores, T of them a
token), or is cheap (the delta rule, the sums over a token's experts): that is computed again.
"""


def recomputed(forward: BlockForward, *, how: Remat, gathers: bool = False) -> BlockForward:
    """A block's forward that is run again in the backward: all of it, or (``selective``) all but what ``KEPT`` lists.

    A function and no wrapping module, so that parameters keep their names. Routers count outside of blocks, hence once.

    Args:
        forward: of a block.
        how: not ``none``.
        gathers: whether FSDP gathers parameters of a part of the block when that runs; not for what is compiled.
    """
    assert how is not Remat.none, f"{how=}"
    chosen: dict[str, Any] = {}
    if how is Remat.selective:
        contexts = partial(create_selective_checkpoint_contexts, _policy)  # which torch.compile knows
        chosen["context_fn"] = partial(_unevenly, contexts) if gathers else contexts

    def run(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        # Nothing in a model draws random numbers, so that there is no state of a generator to bring back.
        return checkpoint(forward, block, x, context, use_reentrant=False, preserve_rng_state=False, **chosen)

    return run


def _unevenly(contexts: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """What keeps results, and what finds them again without looking at anything else."""
    keep, reuse = contexts()
    return keep, _Reuse(reuse)


class _Reuse(TorchDispatchMode):
    """Asks torch's own mode for what is kept only.

    That refuses any operator which the forward ran less often; what FSDP does around a part differs in the backward.
    """

    def __init__(self, reuse: TorchDispatchMode) -> None:
        super().__init__()
        self.reuse = reuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or give its result of the forward."""
        if _policy(None, func) is CheckpointPolicy.MUST_SAVE:
            return self.reuse.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operator is kept: asked at each one while a block runs."""
    default = not isinstance(operator, torch._ops.OpOverload) or operator._overloadname == "default"
    kept = default and operator.name() in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
