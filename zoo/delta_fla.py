"""The gated delta rule by flash-linear-attention's Triton kernels; the only file that imports them.

``pip install 'fla-core[cuda]>=0.6'``. Written against the source of 0.6.0 and never run on a GPU: tests check the call
alone, against a stand-in with that version's arguments.
"""

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from zoo.delta_rule import Rule

OLDEST = (0, 6)  # earlier releases read keys past their end where value heads share them
INSTALL = "pip install 'fla-core[cuda]>=0.6'"
WIDEST = 256  # of a key; asserted by its fla/ops/common/chunk_delta_h.py


def choose(device: torch.device, *, dtype: torch.dtype, k_dim: int, wanted: Rule | None = None) -> Rule:
    """What computes the rule for activations of ``dtype`` on a device; to be asked when a model is built.

    Args:
        device: where the model runs.
        dtype: of the activations.
        k_dim: width of a key.
        wanted: what a user asked for; None: the kernels wherever they run.

    Raises:
        ValueError: the kernels are wanted and cannot run; says why, and how to install them.
    """
    obstacle = _obstacle(device, dtype=dtype, k_dim=k_dim)
    if wanted is Rule.fla and obstacle is not None:
        raise ValueError(f"flash-linear-attention's delta rule {obstacle}")
    return wanted or (Rule.torch if obstacle else Rule.fla)


def _obstacle(device: torch.device, *, dtype: torch.dtype, k_dim: int) -> str | None:
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 or fp16, not in {dtype}"
    if k_dim > WIDEST:
        return f"takes keys of at most {WIDEST} numbers, not {k_dim}"
    try:
        found = version("fla-core")
    except PackageNotFoundError:
        return f"is not installed: {INSTALL}"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"is too old ({found}): {INSTALL}"
    return None


def chunked(q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, decay: Tensor, ends: Tensor | None) -> Tensor:
    """What ``zoo.delta_rule.chunked`` computes; shapes as there.

    Args:
        q: (B, T, G, K), of any length; normalised by the kernel and divided by √K.
        k: (B, T, G, K), of any length; normalised by the kernel.
        v: (B, T, H, V), where G divides H.
        beta: (B, T, H).
        decay: (B, T, H), a logarithm.
        ends: (documents + 1,), where each starts in the batch laid end to end, then B T (``zoo.mask.Mask.ends``); the
            kernel reads it on the host, once for all layers that share it. None: each row is one document.

    Returns:
        (B, T, H, V).
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # Triton must not be asked for where there is none

    tensors = {"q": q, "k": k, "v": v, "g": decay, "beta": beta}
    if ends is not None:  # it takes documents of unlike lengths as one row
        tensors = {name: each.flatten(0, 1)[None] for name, each in tensors.items()}
    y, _ = chunk_gated_delta_rule(
        **tensors,
        scale=q.shape[-1] ** -0.5,
        output_final_state=False,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=ends,
    )
    return y.view(v.shape)
