"""Updates of one small model by ours and by torch's optimizers, from the same gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.contender import BETAS, DECAY, EPS, LR
from benchmarks.ours import model_config
from benchmarks.shape import Shape
from parallel import reduce
from parallel.apply import build as build_model
from parallel.apply import fill_fresh
from parallel.config import Dtype, ParallelConfig, PrecisionConfig
from parallel.config_fit import Sizes
from parallel.mesh import Mesh, open_mesh
from parallel.owners import Matrix
from trainer import groups, newton_schulz, optim
from trainer.config import OptimConfig, OptimKind
from trainer.config_muon import MuonConfig
from trainer.groups import Role
from zoo.decoder import Decoder

NUMBERS = MuonConfig(momentum=0.95, nesterov=True, ns_steps=5, coefficients=[3.4445, -4.775, 2.0315], update_rms=0.2)
ADAMW = OptimConfig(kind=OptimKind.adamw, lr=LR, weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
MUON = OptimConfig(
    kind=OptimKind.muon, lr=LR, weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, muon=NUMBERS
)
FP32 = PrecisionConfig(params=Dtype.fp32, compute=Dtype.fp32)


@dataclass
class Contender:
    """Something that is timed.

    Attributes:
        about: what exactly runs.
        step: one update, or one computation.
        parameters: that it updates; empty where it updates nothing.
    """

    about: str
    step: Callable[[], object]
    parameters: list[Tensor]


def contenders(shape: Shape) -> dict[str, Contender]:
    """All that run in one process, each with a model of its own and the same gradients."""
    found = {}
    for name, config in (("our Muon", MUON), ("our AdamW", ADAMW)):
        model = alone(shape)
        more = "Muon, and fused AdamW for all else" if config is MUON else "fused AdamW"
        found[name] = Contender(f"trainer.optim: {more}", optim.build(model, config).step, list(model.parameters()))
    for name, make in (("torch.optim.Muon", _torch_muon), ("torch.optim.AdamW", _torch_adamw)):
        model = alone(shape)
        about, steps = make(model)
        found[name] = Contender(about, _all(steps), list(model.parameters()))
    matrices = [matrix for of in matrices_of(alone(shape)).values() for matrix in of]
    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        about = f"trainer.newton_schulz of matrices of the same sizes in {short}, nothing else"
        found[f"Newton-Schulz, {short}"] = Contender(about, _orthogonalise(matrices, dtype), [])
    return found


def alone(shape: Shape) -> Decoder:
    """A model on one process with its gradients."""
    mesh = open_mesh(Sizes(dp_replicate=1, dp_shard=1), rank=0, local_rank=0)
    model = build_model(model_config(shape), mesh=mesh, precision=FP32)
    assert isinstance(model, Decoder)
    return _filled(model)


def spread(shape: Shape, mesh: Mesh) -> Decoder:
    """A model under FSDP2 with its gradients."""
    plan = ParallelConfig(dp_replicate=1, dp_shard=mesh.sizes.dp_shard)
    model = build_model(model_config(shape), mesh=mesh, precision=FP32, plan=plan)
    assert isinstance(model, Decoder)
    return _filled(model)


def _filled(model: Decoder) -> Decoder:
    fill_fresh(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        reduce.local(parameter.grad).normal_(0.0, 1e-3, generator=generator)
    return model


def matrices_of(model: Decoder) -> dict[str, list[Matrix]]:
    """Muon's matrices by the name of their parameter."""
    return {
        name: groups.matrices(name, parameter.shape, config=model.config)
        for name, parameter in model.named_parameters()
        if groups.role(name, config=model.config) is Role.matrix
    }


def _torch_muon(model: Decoder) -> tuple[str, list[torch.optim.Optimizer]]:
    """Of banks of experts it gets each expert as a parameter of its own, on the same memory."""
    plain: list[nn.Parameter] = []
    others = dict(model.named_parameters())
    for name in matrices_of(model):
        parameter = others.pop(name)
        assert parameter.grad is not None
        pairs = [(parameter, parameter.grad)]
        if parameter.ndim == 3:
            pairs = [(nn.Parameter(x), g) for x, g in zip(parameter.detach(), parameter.grad, strict=True)]
        for each, gradient in pairs:
            each.grad = gradient
            plain.append(each)
    muon = torch.optim.Muon(
        plain,
        lr=LR,
        weight_decay=DECAY,
        momentum=NUMBERS.momentum,
        nesterov=NUMBERS.nesterov,
        ns_steps=NUMBERS.ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    about = "torch.optim.Muon, experts as parameters of their own, and torch's fused AdamW for all else"
    return about, [_adamw(list(others.values()), fused=True), muon]


def _torch_adamw(model: Decoder) -> tuple[str, list[torch.optim.Optimizer]]:
    return "torch.optim.AdamW as it is by default", [_adamw(list(model.parameters()), fused=None)]


def _adamw(parameters: list[nn.Parameter], *, fused: bool | None) -> torch.optim.Optimizer:
    split = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(split, lr=LR, betas=BETAS, eps=EPS, fused=fused)


def _all(optimizers: list[torch.optim.Optimizer]) -> Callable[[], object]:
    return lambda: [optimizer.step() for optimizer in optimizers]


def _orthogonalise(matrices: list[Matrix], dtype: torch.dtype) -> Callable[[], object]:
    sizes = [matrix.size for matrix in matrices]
    stacks = [torch.randn(sizes.count(size), *size).to(dtype) for size in sorted(set(sizes))]

    def run() -> None:
        for stack in stacks:
            newton_schulz.orthogonal(stack, coefficients=NUMBERS.coefficients, steps=NUMBERS.ns_steps)

    return run
