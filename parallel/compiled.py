"""Blocks compiled by torch.compile, each as a whole: what it cannot compile is an error and never left as it was.

But for blocks whose tokens travel to experts on other ranks: what sends them runs as it is, between compiled parts.
"""

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from parallel.config import Remat
from parallel.mesh import MeshError
from parallel.remat import BlockForward, recomputed
from zoo.attention import Attention
from zoo.block import Block
from zoo.context import Context
from zoo.deltanet import DeltaNet
from zoo.dispatch import Dispatcher
from zoo.kernel import render
from zoo.kernel_choice import KernelName
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


def compiled_around_travels(how: Remat, *, backend: str = "inductor") -> BlockForward:
    """As ``compiled``, of blocks whose tokens travel to experts on other ranks: what sends them runs as it is.

    Recomputation goes around compiled parts, not into them. The selective one looks at single operators, which compiled
    parts do not show: under it, the mixer's half is compiled as a whole, and the feed-forward runs as it is.
    """
    if how is Remat.selective:
        mixed, fed = compiled(recomputed(_mixed, how=how), backend=backend), recomputed(_fed, how=how, gathers=True)
        return lambda block, x, context: fed(block, mixed(block, x, context)[0], context)
    parts = torch.compile(Block.forward, backend=backend, recompile_limit=LIMIT)  # type: ignore[call-overload]

    def run(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
        assert block.moe is not None, f"{block=}"
        _leave_alone(block.moe.dispatcher)
        result: tuple[Tensor, Tally | None] = parts(block, x, _own(block, context))
        return result

    return run if how is Remat.none else recomputed(run, how=how)


def travels(block: Block) -> bool:
    """Whether tokens leave this rank for experts."""
    return block.moe is not None and block.moe.dispatcher.travels


def _mixed(block: Block, x: Tensor, context: Context) -> tuple[Tensor, None]:
    return block.mixed(x, context), None


def _fed(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Tally | None]:
    return block.fed(x, context)


def _leave_alone(dispatcher: Dispatcher) -> None:
    """Let no compilation into what sends tokens; it waits for the device to learn sizes."""
    for name in ("dispatch", "arrived", "combine"):
        if name not in vars(dispatcher):
            setattr(dispatcher, name, torch.compiler.disable(getattr(dispatcher, name)))


def _own(block: Block, context: Context) -> Context:
    """What a block reads of what all share, made beforehand: compiled code may not make it.

    Nothing else goes in, for the code is made for all that it could read: so it is one for all blocks of a kind.
    """
    mixer, rotations = block.mixer, []
    if isinstance(mixer, DeltaNet):
        mask = context.mask()
        render(mask, KernelName.plain)
    elif isinstance(mixer, MLA):
        rope, dim = mixer.config.rope, mixer.config.rope_dim
        rotations = [(rope, dim, context.rotation(rope, dim=dim))]
        mask = context.mask()
        mixer.kernel.prepare(mask)
    else:
        assert isinstance(mixer, Attention), f"{mixer=}"
        c = mixer.config
        if c.rope is not None:
            rotations = [(c.rope, c.head_dim, context.rotation(c.rope, dim=c.head_dim))]
        mask = context.mask(window=c.window, chunk=c.chunk)
        mixer.kernel.prepare(mask)
    return replace(context, rotations=rotations, masks={(mask.window, mask.chunk): mask})
