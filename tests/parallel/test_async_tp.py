"""Overlapped products: torch's operators, whose plain form runs here, called as their schemas say."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from distributed import run

from parallel.async_tp import OverlappedMLP, gather_product, overlap, product_scatter
from parallel.comm import Lane
from parallel.mesh import MeshError
from parallel.tensor import become
from zoo.config_ff import Activation, MLPConfig
from zoo.mlp import MLP

B, T, D, F = 2, 8, 6, 12


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lane():
    """This rank's; where there are no GPUs the operators get their own fallbacks."""
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter_fallback, "CPU")
    group = dist.group.WORLD
    return Lane(group, group.rank(), group.size()), library


def into():
    own, _library = lane()
    x = drawn(B, T, D, seed=0).chunk(own.size, dim=1)[own.rank].clone().requires_grad_()
    weights = [drawn(F, D, seed=s).chunk(own.size)[own.rank].clone().requires_grad_() for s in (1, 2)]
    results = gather_product(x, weights, own)
    grads = [drawn(B, T, F, seed=s).chunk(own.size, dim=2)[own.rank] for s in (3, 4)]
    torch.autograd.backward(results, grads)
    return [y.detach() for y in results], x.grad, [weight.grad for weight in weights]


def test_products_of_gathered_tokens():
    x = drawn(B, T, D, seed=0).requires_grad_()
    weights = [drawn(F, D, seed=s).requires_grad_() for s in (1, 2)]
    want = [x @ weight.t() for weight in weights]
    torch.autograd.backward(want, [drawn(B, T, F, seed=s) for s in (3, 4)])
    ranks = run(into, world_size=2)
    for place in range(2):
        torch.testing.assert_close(torch.cat([found[0][place] for found in ranks], dim=2), want[place].detach())
        torch.testing.assert_close(torch.cat([found[2][place] for found in ranks]), weights[place].grad)
    torch.testing.assert_close(torch.cat([found[1] for found in ranks], dim=1), x.grad)


def out_of():
    own, _library = lane()
    h = drawn(B, T, F, seed=0).chunk(own.size, dim=2)[own.rank].clone().requires_grad_()
    weight = drawn(D, F, seed=1).chunk(own.size, dim=1)[own.rank].clone().requires_grad_()
    y = product_scatter(h, weight, own)
    y.backward(drawn(B, T, D, seed=2).chunk(own.size, dim=1)[own.rank])
    return y.detach(), h.grad, weight.grad


def test_products_that_are_scattered():
    h, weight = drawn(B, T, F, seed=0).requires_grad_(), drawn(D, F, seed=1).requires_grad_()
    y = h @ weight.t()
    y.backward(drawn(B, T, D, seed=2))
    ranks = run(out_of, world_size=2)
    for place, (dim, want) in enumerate([(1, y.detach()), (2, h.grad), (1, weight.grad)]):
        torch.testing.assert_close(torch.cat([found[place] for found in ranks], dim=dim), want)


def made(activation):
    mlp = MLP(MLPConfig(d_ff=F, activation=activation, bias=True), d_model=D).to(torch.float64)
    for seed, parameter in enumerate(mlp.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed)
    return mlp


def feed_forward(activation):
    own, _library = lane()
    mlp = made(activation)
    for name, parameter in list(mlp.named_parameters()):
        path, _, leaf = name.rpartition(".")
        if name != "down.bias":
            part = parameter.detach().chunk(own.size, dim=1 if path == "down" else 0)[own.rank].clone()
            mlp.get_submodule(path).register_parameter(leaf, torch.nn.Parameter(part))
    become(mlp, OverlappedMLP, lane=own)
    x = drawn(B, T, D, seed=7).chunk(own.size, dim=1)[own.rank].clone().requires_grad_()
    y = mlp(x)
    y.square().sum().backward()
    return y.detach(), x.grad, {name: parameter.grad for name, parameter in mlp.named_parameters()}


@pytest.mark.parametrize("activation", [Activation.swiglu, Activation.gelu])
def test_a_feed_forward_that_overlaps_computes_what_one_process_does(activation):
    mlp, x = made(activation), drawn(B, T, D, seed=7).requires_grad_()
    y = mlp(x)
    y.square().sum().backward()
    ranks = run(feed_forward, world_size=2, activation=activation)
    torch.testing.assert_close(torch.cat([found[0] for found in ranks], dim=1), y.detach())
    torch.testing.assert_close(torch.cat([found[1] for found in ranks], dim=1), x.grad)
    for name, parameter in mlp.named_parameters():
        parts = [found[2][name] for found in ranks]
        got = sum(parts) if name == "down.bias" else torch.cat(parts, dim=1 if name == "down.weight" else 0)
        torch.testing.assert_close(got, parameter.grad)


def test_processes_without_gpus_are_told_in_one_line():
    with pytest.raises(MeshError, match="^parallel.async_tp=true: needs GPUs, this is a cpu$"):
        overlap(torch.nn.Module(), Lane(None, 0, 2), device=torch.device("cpu"))
