import pytest
import torch

from zoo import expert_loop, kernel, linear
from zoo.config_ff import MoEConfig, RouterConfig, Score
from zoo.experts import Experts
from zoo.linear import Linear
from zoo.mask import Mask


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["native", "widened"])
def machine(request, monkeypatch):
    """A CPU with bf16 instructions, and one without."""

    def product_dtype(dtype, device):
        return request.param if dtype is torch.bfloat16 else dtype

    for module in (linear, kernel, expert_loop):
        monkeypatch.setattr(module, "product_dtype", product_dtype)


def close(got, want, error):
    assert (got.double() - want.double()).norm() <= error * want.double().norm()


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_products_and_gradients_are_near_exact_ones_on_every_machine(machine, bias):
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    x = torch.randn(3, 5, 24).bfloat16().requires_grad_()
    pull = torch.randn(3, 5, 40).bfloat16()
    y = layer(x)
    assert y.dtype is torch.bfloat16
    exact = [each.detach().bfloat16().double().requires_grad_() for each in (x, *layer.parameters())]
    want = torch.nn.functional.linear(*exact)
    close(y, want, 5e-3)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], pull)
    for got, other in zip(grads, torch.autograd.grad(want, exact, pull.double()), strict=True):
        close(got, other, 5e-3)
    assert all(grad.dtype is torch.float32 for grad in grads[1:])


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_experts_and_attention_are_near_exact_ones_on_every_machine(machine, bias):
    torch.manual_seed(0)
    router = RouterConfig(score=Score.softmax, normalize=True, scale=1.0)
    config = MoEConfig(n_experts=3, top_k=2, d_expert=24, d_shared=0, router=router, bias=bias)
    bank = Experts(config, d_model=16)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows, counts = torch.randn(10, 16).bfloat16().requires_grad_(), torch.tensor([4, 0, 6])
    y = bank(rows, counts)
    exact = Experts(config, d_model=16).double()
    exact.load_state_dict({name: value.bfloat16().double() for name, value in bank.state_dict().items()})
    exact_rows = rows.detach().double().requires_grad_()
    want = exact(exact_rows, counts)
    close(y, want, 2e-2)
    pull = torch.randn(10, 16)
    mine = torch.autograd.grad(y, [rows, *bank.parameters()], pull.bfloat16())
    theirs = torch.autograd.grad(want, [exact_rows, *exact.parameters()], pull.double())
    for got, exactly in zip(mine, theirs, strict=True):
        close(got, exactly, 3e-2)

    q, k, v = (torch.randn(2, 7, 4, 8).bfloat16() for _ in range(3))
    attend, mask = kernel.Kernel(scale=0.3, width=8, v_width=8), Mask(None, torch.arange(7).expand(2, 7))
    close(attend(q, k, v, mask), attend(q.double(), k.double(), v.double(), mask), 2e-2)
