"""The optimizer of a spread model, by groups of parameters, and its state by name."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parallel import reduce
from parallel.layout import stored_name
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from trainer import groups
from trainer.adamw import STORED, NarrowAdamW, start_moments
from trainer.config import Moments, OptimConfig, OptimKind
from trainer.groups import Group
from trainer.muon import Muon, Weight, start_momentum
from zoo.config import ModelConfig
from zoo.decoder import Decoder


class Several(torch.optim.Optimizer):
    """Optimizers of different parameters as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = parts
        for part in parts:
            part.state = self.state  # by parameter, of which each has its own
        self.param_groups = [group for part in parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of each (what they communicate: all axes of a stage under Muon)."""
        for part in self.parts:
            part.step()


def build(model: Decoder | Pipeline, config: OptimConfig, *, mesh: Mesh | None = None) -> torch.optim.Optimizer:
    """AdamW, or for matrices Muon beside it; ``groups.group`` says what decays.

    Args:
        model: whose parameters are on their devices already.
        config: the optimizer.
        mesh: its processes, which Muon needs where they are several.
    """
    members: dict[OptimKind, dict[str, tuple[nn.Parameter, Group]]] = {kind: {} for kind in OptimKind}
    for name, parameter in model.named_parameters():
        found = groups.group(
            stored_name(name), parameter.shape, config=model.config, kind=config.kind, no_decay=config.no_decay
        )
        members[found.optimizer][name] = parameter, found
    adamw = _adamw(list(members[OptimKind.adamw].values()), config)
    if config.kind is OptimKind.adamw:
        return adamw
    assert config.muon is not None, f"{config=}"
    if not members[OptimKind.muon]:  # of a stage that only looks tokens up
        return Several([adamw])
    weights, decays = [], True
    for name, (parameter, found) in members[OptimKind.muon].items():
        decays = decays and found.decays  # matrices have one role: all do, or none
        view = reduce.view(model, name, parameter.detach())
        weights.append(Weight(parameter, view, groups.matrices(name, view.shape, config=model.config)))
    muon = Muon(
        weights,
        config=config.muon,
        lr=config.lr,
        weight_decay=config.weight_decay if decays else 0.0,
        stage=None if mesh is None else mesh.lane("stage"),
        copies=1 if mesh is None else mesh.sizes.dp_replicate,
        device=next(model.parameters()).device if mesh is None else mesh.device,
    )
    return Several([adamw, muon])


def _adamw(members: Sequence[tuple[nn.Parameter, Group]], config: OptimConfig) -> torch.optim.Optimizer:
    """The fused AdamW of torch, or ours where moments are narrower than parameters."""
    split = [
        {
            "params": [parameter for parameter, group in members if group.decays is decays],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    betas = config.beta1, config.beta2
    if config.moments is Moments.bf16:
        return NarrowAdamW(split, lr=config.lr, betas=betas, eps=config.eps)
    return torch.optim.AdamW(split, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Moments and step counts by parameter name: the live tensors, so that a checkpoint is read into them.

    State that the first update has yet to make is made here, as zeros.
    """
    parts = optimizer.parts if isinstance(optimizer, Several) else [optimizer]
    for part in parts:
        for parameter in [p for group in part.param_groups for p in group["params"]]:
            if isinstance(part, Muon):
                start_momentum(optimizer.state[parameter], parameter)
            else:
                dtype = STORED if isinstance(part, NarrowAdamW) else parameter.dtype
                start_moments(optimizer.state[parameter], parameter, dtype=dtype)
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def table(config: ModelConfig, optim: OptimConfig) -> str:
    """What gets which optimizer, learning rate and weight decay, for the start of a run."""
    return groups.rendered(groups.table(shapes(config), config=config, optim=optim))


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the parameters of a whole model."""
    with torch.device("meta"):
        whole = Decoder(config)
    return {name: parameter.shape for name, parameter in whole.named_parameters()}
