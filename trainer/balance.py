"""Aux-loss-free balancing: experts that got too much work are made less attractive, after each update.

And what balance losses need of a trainer: loads of a whole global batch ahead of it, sums of what layers added.
docs/decisions/balancing.md has all kinds.
Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; the increment's mean is taken off, which changes no choice and
keeps the bias bounded (Moonlight, arXiv 2502.16982).
"""

import torch
from torch import Tensor

from parallel import reduce
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from zoo.config import ModelConfig
from zoo.decoder import Decoder


@torch.no_grad()
def update(model: Decoder | Pipeline, mesh: Mesh, *, scale: float = 1.0) -> Tensor | None:
    """Move every router's bias by the load of the whole global batch, and start counting anew (an all-reduce of loads).

    Over dp, cp and pp; and over tp, where its ranks route tokens of their own. Routers without such a bias are counted
    only.

    Example: loads 4 1 1 have mean 2 and increments −u u u, less their mean u/3: −4u/3 2u/3 2u/3.

    Args:
        model: whose routers.
        mesh: over which they counted.
        scale: what multiplies each router's ``balance_rate``; 0 leaves biases where they are.

    Returns:
        (layers, E) tokens sent to each expert, of all ranks and stages; None without experts.
    """
    names = routers(model.config)
    if not names:
        return None
    loads = _loads(model, mesh, names)
    for name, router in model.routers().items():
        load = loads[names.index(name)].to(router.load.dtype)
        bias, rate = router.balance_bias, router.config.balance_rate
        if bias is not None and rate is not None:
            increment = torch.sign(load.mean() - load) * (rate * scale)
            bias += increment - increment.mean()
        router.load.zero_()
        router.balance_value.zero_()
        router.z_value.zero_()
    return loads


def counts_ahead(config: ModelConfig) -> bool:
    """Whether some loss asks what all tokens of a global batch choose, before the first gradient of it is made."""
    return any(layer.moe is not None and layer.moe.router.counts_ahead for layer in config.layers)


@torch.no_grad()
def ahead(model: Decoder | Pipeline, mesh: Mesh) -> None:
    """Tell routers what forwards of the whole global batch have counted; these do not count again (as ``update``)."""
    names = routers(model.config)
    loads = _loads(model, mesh, names)
    for name, router in model.routers().items():
        router.batch_load.copy_(loads[names.index(name)])
        router.load.zero_()


@torch.no_grad()
def losses(model: Decoder | Pipeline, mesh: Mesh) -> Tensor:
    """(2,) balance losses and z-losses of this rank's layers and rows (over tp where its ranks have own tokens)."""
    values = [torch.stack([router.balance_value, router.z_value]) for router in model.routers().values()]
    total = sum(values, start=torch.zeros(2, dtype=torch.float64, device=mesh.device))
    return total if mesh.sizes.expert_tp else reduce.total(total, mesh, axis="tp")


def _loads(model: Decoder | Pipeline, mesh: Mesh, names: list[str]) -> Tensor:
    """(layers, E) tokens sent to each expert, of all ranks and stages."""
    n_experts = max(layer.moe.n_experts for layer in model.config.layers if layer.moe is not None)
    loads = torch.zeros(len(names), n_experts, dtype=torch.float64, device=mesh.device)
    for name, router in model.routers().items():
        loads[names.index(name)] = router.load
    if not mesh.sizes.expert_tp:
        reduce.total(loads, mesh, axis="tp")
    return reduce.total(loads, mesh, axis="losses")


def z_losses(config: ModelConfig) -> bool:
    """Whether any router has a z-loss."""
    return any(layer.moe is not None and layer.moe.router.z_loss > 0 for layer in config.layers)


def routers(config: ModelConfig) -> list[str]:
    """Names of all routers of a model, in the order of layers."""
    return [f"{name}{'.block' * name.startswith('mtp.')}.moe.router" for name in layers(config)]


def layers(config: ModelConfig) -> list[str]:
    """Names of all layers with experts, such as ``blocks.3`` and ``mtp.0``, in order."""
    blocks = [f"blocks.{i}" for i, layer in enumerate(config.layers) if layer.moe is not None]
    return [*blocks, *(f"mtp.{k}" for k in range(config.n_mtp) if config.layers[-1].moe is not None)]
