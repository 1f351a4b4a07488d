"""Aux-loss-free balancing: experts that got too much work are made less attractive, after each update.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; the increment's mean is taken off, which changes no choice and
keeps the bias bounded (Moonlight, arXiv 2502.16982).
"""

import torch
from torch import Tensor

from parallel import reduce
from parallel.mesh import Mesh
from zoo.decoder import Decoder


@torch.no_grad()
def update(model: Decoder, mesh: Mesh) -> Tensor | None:
    """Move every router's bias by the load of the whole global batch, and start counting anew (one all-reduce over dp).

    Routers without such a bias are counted only.

    Example: loads 4 1 1 have mean 2 and increments −u u u, less their mean u/3: −4u/3 2u/3 2u/3.

    Returns:
        (layers, E) tokens sent to each expert, of all ranks; None without experts.
    """
    routers = list(model.routers().values())
    if not routers:
        return None
    loads = reduce.total(torch.stack([router.load for router in routers]), mesh)
    for router, load in zip(routers, loads, strict=True):
        bias, rate = router.balance_bias, router.config.balance_rate
        if bias is not None and rate is not None:
            increment = torch.sign(load.mean() - load) * rate
            bias += increment - increment.mean()
        router.load.zero_()
        router.balance_value.zero_()
    return loads
