"""Blocks compiled by torch.compile, each as a whole: what it cannot compile is an error and never left as it was."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from parallel.mesh import MeshError
from parallel.remat import BlockForward
from zoo.attention import Attention
from zoo.block import Block
from zoo.context import Context
from zoo.deltanet import DeltaNet
from zoo.kernel_choice import KernelName
from zoo.mask import Mask
from zoo.mla import MLA
from zoo.router import Tally

LIMIT = 64
"""Versions of a block's code at most: kinds of layer, times what differs between forwards, such as having documents."""


def compiled(forward: BlockForward, *, backend: str = "inductor") -> BlockForward:
    """A block's forward that is compiled when it first runs, once for all blocks of a kind.

    Args:
        forward: what to compile.
        backend: of torch.compile; ``aot_eager_decomp_partition`` does all but generate code.

    Returns:
        A forward that raises MeshError where torch.compile cannot do it.
    """
    # Of zoo.linear.product_dtype, which on one machine is a pure function.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    # fullgraph: a part that cannot be compiled would run as it was, and so would all of it beyond the limit.
    run_compiled = torch.compile(forward, fullgraph=True, backend=backend, recompile_limit=LIMIT)  # type: ignore[call-overload]

    def run(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # 1.6 s, for this only

        own = _own(block, context)
        try:
            return run_compiled(block, x, own)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            said = " ".join(str(error).split("\n\n")[0].split())
            raise MeshError(f"parallel.compile=true: torch.compile cannot do this model: {said}") from error

    return run


def _own(block: Block, context: Context) -> Context:
    """What a block reads of what all share, made beforehand: compiled code may not make it.

    Nothing else goes in, for the code is made for all that it could read: so it is one for all blocks of a kind.
    """
    mixer, rotations = block.mixer, []
    if isinstance(mixer, DeltaNet):
        mask = _rendered(context.mask(), KernelName.plain)
    elif isinstance(mixer, MLA):
        rope, dim = mixer.config.rope, mixer.config.rope_dim
        rotations = [(rope, dim, context.rotation(rope, dim=dim))]
        mask = _rendered(context.mask(), mixer.kernel.chosen)
    else:
        assert isinstance(mixer, Attention), f"{mixer=}"
        c = mixer.config
        if c.rope is not None:
            rotations = [(c.rope, c.head_dim, context.rotation(c.rope, dim=c.head_dim))]
        mask = _rendered(context.mask(window=c.window, chunk=c.chunk), mixer.kernel.chosen)
    return replace(context, rotations=rotations, masks={(mask.window, mask.chunk): mask})


def _rendered(mask: Mask, kernel: KernelName) -> Mask:
    """A mask that has made what a kernel reads of it."""
    parts = {
        KernelName.plain: lambda: mask.pieces,
        KernelName.sdpa: lambda: mask.dense,
        KernelName.flex: lambda: mask.blocks,
        KernelName.varlen: lambda: mask.ends,
    }
    parts[kernel]()
    return mask
