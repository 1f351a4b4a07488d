"""Which of several implementations computes a part, chosen when a model is built and told at the start of a run."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from parallel.config import KernelChoice
from parallel.mesh import MeshError
from parallel.ring import Ring
from zoo import delta_fla
from zoo.decoder import Decoder
from zoo.deltanet import DeltaNet
from zoo.experts import Experts, grouped_is_faster
from zoo.kernel import Kernel
from zoo.kernel_choice import KernelName, able, choose, lacks


def choose_kernels(model: Decoder, wanted: KernelChoice, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give all attention the kernel that is wanted, or under ``auto`` a layer's best one; and the rest theirs.

    Raises:
        MeshError: it cannot do what a layer needs, or under ``auto`` none can that is made for the device.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.grouped = grouped_is_faster(device, dtype, widths=module.gate.shape[1:])
        elif isinstance(module, DeltaNet):
            module.chosen = delta_fla.choose(device, dtype=dtype, k_dim=module.config.k_dim)
    for name, module in _kernels(model):
        if isinstance(module, Ring):  # its blocks have kernels of their own
            _check_ring(wanted, device=device, dtype=dtype)
            continue
        best = choose(module.needs, device=device, dtype=dtype)
        auto = wanted is KernelChoice.auto
        chosen = best if auto else KernelName(wanted.value)
        missing = [] if chosen is None else lacks(chosen, module.needs, device=device, dtype=dtype)
        if chosen is None or missing:
            others: list[str] = [*able(module.needs, device=device, dtype=dtype)]
            if best is not None:
                others.insert(0, KernelChoice.auto)
            allowed = " or ".join(filter(None, [", ".join(others[:-1]), others[-1]]))
            cannot = "no fast kernel does this" if chosen is None else f"cannot do {', '.join(missing)}"
            layer = name.removesuffix(".kernel")
            raise MeshError(f"parallel.kernel={wanted}: {cannot} ({layer}): must be {allowed}")
        module.chosen = chosen


def _check_ring(wanted: KernelChoice, *, device: torch.device, dtype: torch.dtype) -> None:
    """Whether ring attention can run, which leaves no choice of kernels.

    Raises:
        MeshError: a kernel is wanted, or there is none for the format.
    """
    if wanted is not KernelChoice.auto:
        raise MeshError(f"parallel.kernel={wanted}: must be auto where parallel.context=ring")
    if device.type == "cuda" and dtype is torch.float64:
        raise MeshError("parallel.context=ring: has no kernel for fp64 on a GPU: must be gather or ulysses")


def _kernels(model: nn.Module) -> Iterator[tuple[str, Kernel]]:
    """Kernels of attention by module name, in the order of layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Kernel))


def told(model: nn.Module) -> list[str]:
    """What was chosen, in a few words a part."""
    parts = []
    chosen = Counter("ring" if isinstance(module, Ring) else module.chosen.value for _, module in _kernels(model))
    if len(chosen) == 1:
        parts.append(f"attention: {next(iter(chosen))}")
    elif chosen:
        counts = [f"{name} in {count} layer{'s' * (count > 1)}" for name, count in chosen.most_common()]
        parts.append(f"attention: {', '.join(counts)}")
    rules = {module.chosen for module in model.modules() if isinstance(module, DeltaNet)}
    parts += [f"delta rule: {rule}" for rule in sorted(rules)]
    banks = [module for module in model.modules() if isinstance(module, Experts)]
    if banks:
        parts.append(f"experts: {'grouped products' if banks[0].grouped else 'one after another'}")
    return parts
