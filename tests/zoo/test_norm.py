import pytest
import torch
import torch.nn.functional as F

from zoo.config_mixer import NormConfig, NormKind, QKNormConfig, Scope
from zoo.norm import BareNorm, LayerNorm, RMSNorm, heads_norm, norm

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def draw(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def plain(x, module, eps, offset):
    wide = x.double()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled if module.weight is None else scaled * (module.weight.double() + offset)


def check(module, expected, x, error):
    """Outputs and gradients of input and parameters."""
    pull = torch.randn(x.shape).to(x.dtype)
    got, want = module(x), expected(x)
    assert got.dtype is x.dtype
    torch.testing.assert_close(got.double(), want, rtol=error, atol=error)
    inputs = [x, *module.parameters()]
    grads = torch.autograd.grad((got * pull).sum(), inputs)
    for each, other in zip(grads, torch.autograd.grad((want * pull).sum(), inputs), strict=True):
        torch.testing.assert_close(each.double(), other.double(), rtol=error, atol=error * 5)


@pytest.mark.parametrize("offset, late_cast", [(0.0, False), (0.0, True), (1.0, True), (1.0, False)])
@pytest.mark.parametrize("dtype, error", DTYPES)
def test_norm_and_its_gradients_equal_a_plain_computation(dtype, error, offset, late_cast):
    torch.manual_seed(0)
    module = draw(norm(24, NormConfig(eps=1e-3, offset=offset, late_cast=late_cast))).to(dtype)
    assert isinstance(module, RMSNorm)
    x = torch.randn(3, 5, 24).to(dtype).transpose(0, 1).requires_grad_()  # strided, as heads are
    check(module, lambda x: plain(x, module, 1e-3, offset), x, error)


@pytest.mark.parametrize("dtype, error", DTYPES)
def test_a_norm_without_a_weight_equals_a_plain_computation(dtype, error):
    torch.manual_seed(0)
    module = norm(24, NormConfig(eps=1e-2, kind=NormKind.bare))
    assert isinstance(module, BareNorm) and not list(module.parameters())
    module.weight = None
    x = torch.randn(3, 5, 24).to(dtype).transpose(0, 1).requires_grad_()
    check(module, lambda x: plain(x, module, 1e-2, 0.0), x, error)


@pytest.mark.parametrize("dtype, error", DTYPES)
@pytest.mark.parametrize("own", [False, True])
def test_layer_norm_with_weights_for_all_heads_or_for_each_equals_a_plain_computation(dtype, error, own):
    torch.manual_seed(0)
    config = QKNormConfig(eps=1e-2, kind=NormKind.layer, scope=Scope.own if own else Scope.head)
    module = draw(heads_norm(config, n_heads=3, head_dim=8)).to(dtype)
    assert isinstance(module, LayerNorm) and module.bias.shape == ((3, 8) if own else (8,))

    def expected(x):
        wide = x.double()
        centred = wide - wide.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt()
        return scaled * module.weight.double() + module.bias.double()

    check(module, expected, torch.randn(2, 5, 3, 8).to(dtype).requires_grad_(), error * 2)


@pytest.mark.parametrize("scope, shape", [(Scope.head, (8,)), (Scope.width, (24,))])
def test_queries_are_normalised_by_head_or_over_their_whole_width(scope, shape):
    module = draw(heads_norm(QKNormConfig(eps=1e-6, scope=scope), n_heads=3, head_dim=8))
    assert module.weight.shape == shape
    x = torch.randn(2, 5, *([3, 8] if scope is Scope.head else [24]))
    torch.testing.assert_close(module(x), F.rms_norm(x, shape, module.weight, 1e-6))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("late_cast", [False, True])
def test_the_weight_multiplies_before_or_after_the_cast(late_cast, offset):
    torch.manual_seed(0)
    module = draw(norm(64, NormConfig(eps=1e-6, late_cast=late_cast, offset=offset))).bfloat16()
    x = torch.randn(50, 64).bfloat16()
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    late, early = (scaled * (offset + module.weight.float())).bfloat16(), scaled.bfloat16() * (offset + module.weight)
    assert not torch.equal(late, early)
    assert torch.equal(module(x), late if late_cast else early)


@pytest.mark.parametrize("late_cast", [False, True])
def test_a_weight_kept_in_fp32_multiplies_as_one_that_was_gathered_in_the_dtype_of_the_activations(late_cast):
    torch.manual_seed(0)
    kept = draw(RMSNorm(8, NormConfig(eps=1e-5, late_cast=late_cast)))
    gathered = RMSNorm(8, NormConfig(eps=1e-5, late_cast=late_cast)).bfloat16()
    gathered.load_state_dict(kept.state_dict())
    x = torch.randn(4, 8).bfloat16().requires_grad_()
    y = kept(x)
    y.sum().backward()
    assert y.dtype is torch.bfloat16 and kept.weight.grad.dtype is torch.float32
    assert torch.equal(y, gathered(x))
