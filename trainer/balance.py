"""Aux-loss-free balancing: experts that got too much work are made less attractive, after each update.

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
    mine = {names.index(name): router for name, router in model.routers().items()}
    n_experts = max(layer.moe.n_experts for layer in model.config.layers if layer.moe is not None)
    loads = torch.zeros(len(names), n_experts, dtype=torch.float64, device=mesh.device)
    for place, router in mine.items():
        loads[place] = router.load
    if not mesh.sizes.expert_tp:
        reduce.total(loads, mesh, axis="tp")
    reduce.total(loads, mesh, axis="losses")
    for place, router in mine.items():
        bias, rate, load = router.balance_bias, router.config.balance_rate, loads[place].to(router.load.dtype)
        if bias is not None and rate is not None:
            increment = torch.sign(load.mean() - load) * (rate * scale)
            bias += increment - increment.mean()
        router.load.zero_()
        router.balance_value.zero_()
    return loads


def routers(config: ModelConfig) -> list[str]:
    """Names of all routers of a model, in the order of layers."""
    blocks = [f"blocks.{i}" for i, layer in enumerate(config.layers) if layer.moe is not None]
    further = [f"mtp.{k}.block" for k in range(config.n_mtp) if config.layers[-1].moe is not None]
    return [f"{name}.moe.router" for name in [*blocks, *further]]
