"""Which kernel attends: a table, so that the choice is made and refused when a model is built."""

from dataclasses import dataclass
from enum import StrEnum

import torch


class KernelName(StrEnum):
    """Kernels of attention."""

    plain = "plain"  # written out: everything
    sdpa = "sdpa"  # torch's scaled_dot_product_attention; any mask, but a dense one
    flex = "flex"  # torch's flex_attention
    varlen = "varlen"  # flash attention by torch's varlen_attn


@dataclass(frozen=True)
class Needs:
    """What a layer asks of its kernel. Documents, windows and chunks are not listed: every kernel has them.

    Attributes:
        width: of queries and keys.
        v_width: of values.
        softcap: scores are capped.
        temperature: capped scores are multiplied by a number that depends on the query.
        sinks: the denominator has one more logit.
    """

    width: int
    v_width: int
    softcap: bool = False
    temperature: bool = False
    sinks: bool = False


FAST = {
    ("cpu", torch.float64): [KernelName.sdpa, KernelName.plain],
    ("cpu", torch.float32): [KernelName.sdpa, KernelName.plain],
    ("cpu", torch.bfloat16): [KernelName.sdpa, KernelName.plain],
    ("cuda", torch.float64): [KernelName.plain],  # no fused kernel has this format
    ("cuda", torch.float32): [KernelName.sdpa, KernelName.flex],
    ("cuda", torch.bfloat16): [KernelName.varlen, KernelName.flex, KernelName.sdpa],
}
"""Kernels by device and format, best first. ``plain`` only where no other is made for the place: it is slow."""


def choose(needs: Needs, *, device: torch.device, dtype: torch.dtype) -> KernelName | None:
    """The best kernel that can do it; None: none but ``plain``, which on CUDA is slow and taken only on request."""
    for name in FAST[device.type, dtype]:
        if not lacks(name, needs, device=device, dtype=dtype):
            return name
    return None


def able(needs: Needs, *, device: torch.device, dtype: torch.dtype) -> list[KernelName]:
    """All kernels that can do it."""
    return [name for name in KernelName if not lacks(name, needs, device=device, dtype=dtype)]


def lacks(name: KernelName, needs: Needs, *, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What a kernel cannot do of what is needed, in words; empty: it can."""
    if name is KernelName.plain:
        return []
    slots = {"softcap": needs.softcap, "temperature": needs.temperature, "sinks": needs.sinks}
    if name is KernelName.flex:
        return _held(
            {
                "a backward on a CPU": device.type != "cuda",
                f"{dtype}".removeprefix("torch."): dtype is torch.float64,
                "heads of fewer than 16 dimensions": min(needs.width, needs.v_width) < 16,  # tiles of Triton's dot
            }
        )
    if name is KernelName.sdpa:
        return _held(slots)
    return _held(
        slots
        | {
            "a CPU": device.type != "cuda",
            f"{dtype}".removeprefix("torch."): dtype not in (torch.bfloat16, torch.float16),
            "values of another width than keys": needs.width != needs.v_width,
            "heads that are no multiple of 8 up to 256": needs.width % 8 != 0 or needs.width > 256,
        }
    )


def _held(reasons: dict[str, bool]) -> list[str]:
    return [reason for reason, holds in reasons.items() if holds]
