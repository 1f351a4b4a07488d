"""Activation checkpointing: a block keeps its input, and what else it held for the backward is computed again there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
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
    "flex_attention",  # an operator over a function, which has no namespace
)
"""Operators whose results ``selective`` keeps, by name: products of activations with weights, and fused attention.

Batched products are not among them. What makes them writes over their results (``plain`` attention: scores, T of them a
token), or is cheap (the delta rule, the sums over a token's experts): that is computed again.
"""


def recomputed(forward: BlockForward, *, how: Remat) -> BlockForward:
    """A block's forward that is run again in the backward: all of it, or (``selective``) all but what ``KEPT`` lists.

    A function and no wrapping module, so that parameters keep their names. Routers count outside of blocks, hence once.
    """
    assert how is not Remat.none, f"{how=}"
    chosen: dict[str, Any] = {}
    if how is Remat.selective:
        chosen["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        # Nothing in a model draws random numbers, so that there is no state of a generator to bring back.
        return checkpoint(forward, block, x, context, use_reentrant=False, preserve_rng_state=False, **chosen)

    return run


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operator is kept: asked at each one while a block runs."""
    default = not isinstance(operator, torch._ops.OpOverload) or operator._overloadname == "default"
    kept = default and operator.name() in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
