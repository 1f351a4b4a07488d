"""Forwards and backwards of small models in float64, to compare plans: ``from micro import made, outcome``."""

from collections.abc import Sequence
from functools import partial

import torch
from models import compose
from torch import Tensor

from parallel import reduce
from parallel.apply import build, fill_fresh
from parallel.config import Dtype, ParallelConfig, PrecisionConfig
from parallel.config_fit import Sizes
from parallel.fsdp import sync_gradients
from parallel.mesh import Mesh, open_mesh
from trainer.loss import cross_entropy
from zoo.config import ModelConfig
from zoo.decoder import Decoder, Objective

FP64 = PrecisionConfig(Dtype.fp64, Dtype.fp64)


def small(name: str) -> ModelConfig:
    """A tiny model; MTP of two depths, and a window that is shorter than rows."""
    changes: dict[str, dict[str, int]] = {
        "deepseek_v3_tiny": {"n_mtp": 2},
        "gpt_oss_tiny": {"blocks__local__attention__window": 5},
    }
    return compose(name, **changes.get(name, {}))


def made(config: ModelConfig, mesh: Mesh, plan: ParallelConfig, compiler: str = "inductor") -> Decoder:
    """A model with the same initial values under every plan, and biases of routers that turn choices."""
    model = build(config, mesh=mesh, precision=FP64, plan=plan, compiler=compiler)
    fill_fresh(model, seed=5)
    with torch.no_grad():
        for router in model.routers().values():
            if router.balance_bias is not None:
                router.balance_bias.copy_(torch.linspace(-0.1, 0.1, len(router.balance_bias)))
    assert isinstance(model, Decoder)
    return model.train()


def loss(model: Decoder, seed: int, rows: int = 2, length: int = 16) -> Tensor:
    """Losses of random rows of uneven documents, with the balance losses in the gradient."""
    generator = torch.Generator().manual_seed(seed)
    vocab, depths = model.config.vocab_size, model.config.n_mtp
    tokens, targets = torch.randint(0, vocab, (2, rows, length), generator=generator)
    further = torch.randint(0, vocab, (2, rows, depths, length), generator=generator)
    documents = (torch.rand(rows, length, generator=generator) < 0.2).cumsum(1)
    rows_of_all = torch.tensor(4.0, dtype=torch.float64)
    objective = Objective(targets, further[0], further[1], rows_of_all, partial(cross_entropy, chunk=11))
    return model(tokens, documents=documents, objective=objective)


def outcome(model: Decoder, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Losses of some micro-batches, whole gradients, and what routers counted."""
    found = {}
    for i, seed in enumerate(seeds):
        sync_gradients(model, now=i == len(seeds) - 1)
        losses = loss(model, seed)
        losses.sum().backward()
        found[f"losses {i}"] = losses.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = reduce.whole(parameter.grad).clone()
    for name, router in model.routers().items():
        found[f"{name}.load"], found[f"{name}.balance"] = router.load.clone(), router.balance_value.clone()
    return found


def alone() -> Mesh:
    """One process."""
    return open_mesh(Sizes(1, 1), rank=0, local_rank=0)
