"""softmax(QKᵀ)V behind one signature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config_mixer import TemperatureConfig
from zoo.kernel_choice import KernelName, Needs, choose
from zoo.kernel_flex import flex
from zoo.kernel_max import measured
from zoo.kernel_plain import plain
from zoo.kernel_varlen import varlen
from zoo.linear import product_dtype
from zoo.mask import Mask
from zoo.section import Section
from zoo.temperature import sharpening


class Kernel(nn.Module):
    """Attention of queries to keys; a module, so that context parallelism can put another in its place.

    Attributes:
        chosen: the kernel that a CPU takes until who builds the model chooses for its device.
        top: (H,), the largest logit of each head in training since who reads it began anew: scaled and seen, before
            softcap and temperature; None: it is not measured, which costs nothing.
    """

    top: Tensor | None

    def __init__(
        self,
        *,
        scale: float,
        width: int,
        v_width: int,
        softcap: float | None = None,
        temperature: TemperatureConfig | None = None,
        has_sinks: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.softcap, self.temperature = scale, softcap, temperature
        self.needs = Needs(width, v_width, softcap is not None, temperature is not None, has_sinks)
        chosen = choose(self.needs, device=torch.device("cpu"), dtype=torch.float32)
        assert chosen is not None, f"{self.needs=}"
        self.chosen: KernelName = chosen
        self.register_buffer("top", None, persistent=False)

    @property
    def measures(self) -> bool:
        """Whether the largest logits are wanted of this forward."""
        return self.top is not None and self.training

    @property
    def tells(self) -> bool:
        """Whether the kernel gives the largest logits by itself; else a pass of its own finds them."""
        if self.softcap is not None or self.temperature is not None:  # it would give them as these have made them
            return False
        on_gpu = self.top is not None and self.top.device.type == "cuda"  # torch's flex attention tells on no other
        return self.chosen is KernelName.plain or (self.chosen is KernelName.flex and on_gpu)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Section, *, sinks: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: (B, T, H, K).
            k: (B, T, G, K), where G divides H.
            v: (B, T, G, U); U need not be K.
            mask: who sees whom, and at which positions.
            sinks: (H,), one more logit a head, in the softmax's denominator only.

        Returns:
            (B, T, H, U).
        """
        if self.measures and not self.tells:
            self.keep(measured(q, k, mask, scale=self.scale))
        if self.chosen is KernelName.sdpa:
            return sdpa(q, k, v, mask, scale=self.scale)
        if self.chosen is KernelName.varlen:
            return varlen(q, k, v, mask, scale=self.scale)
        factors = None
        if self.temperature is not None:
            factors = sharpening(self.temperature, mask.positions, dtype=torch.promote_types(q.dtype, torch.float32))
        attend = plain if self.chosen is KernelName.plain else flex
        tells = self.measures and self.tells
        y, top = attend(
            q, k, v, mask, scale=self.scale, softcap=self.softcap, factors=factors, sinks=sinks, tells=tells
        )
        if top is not None:
            self.keep(top)
        return y

    def measure(self, *, n_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        """Find the largest logits of so many heads from now on, whenever a model trains."""
        self.top = torch.full((n_heads,), -torch.inf, dtype=dtype, device=device)

    @torch.no_grad()
    def keep(self, top: Tensor) -> None:
        """Take some logits, (H,), into account: a forward that runs again changes nothing."""
        assert self.top is not None
        self.top.copy_(torch.maximum(self.top, top.to(self.top.dtype)))

    def prepare(self, mask: Mask | Section) -> None:
        """Make what the kernel reads of a row's mask, which compiled code may not."""
        render(mask, self.chosen)
        if self.measures and not self.tells:
            render(mask, KernelName.plain)


def render(mask: Mask | Section, kernel: KernelName) -> None:
    """Make what a kernel reads of a mask."""
    parts = {
        KernelName.plain: lambda: mask.pieces,
        KernelName.sdpa: lambda: mask.dense,
        KernelName.flex: lambda: mask.blocks,
        KernelName.varlen: lambda: (mask.ends, mask.key_ends),
    }
    parts[kernel]()


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask | Section, *, scale: float) -> Tensor:
    """Attend by torch's kernels; shapes and arguments as in ``zoo.kernel_plain.plain``."""
    width = v.shape[-1]
    if width < q.shape[-1]:  # torch's fused kernels want one width: padded zeros cost half of what its fallback does
        v = F.pad(v, (0, q.shape[-1] - width))
    narrow, wide = q.dtype, product_dtype(q.dtype, q.device.type)
    q, k, v = (each.to(wide).transpose(1, 2) for each in (q, k, v))
    allowed, grouped = mask.dense, q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2)[..., :width].to(narrow)
