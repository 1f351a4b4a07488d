import pytest
import torch

from zoo.activation import activate
from zoo.config_ff import Activation, MLPConfig
from zoo.mlp import MLP


def made(activation, bias):
    torch.manual_seed(0)
    mlp = MLP(MLPConfig(d_ff=7, activation=activation, bias=bias), d_model=4).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    return mlp


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", Activation)
def test_equals_its_matrices_in_turn(activation, bias):
    mlp, x = made(activation, bias), torch.randn(2, 3, 4, dtype=torch.float64)
    state = mlp.state_dict()

    def product(name, x):
        y = x @ state[f"{name}.weight"].t()
        return y + state[f"{name}.bias"] if bias else y

    gate = None if activation is Activation.gelu else product("gate", x)
    want = product("down", activate(gate, product("up", x), activation))
    torch.testing.assert_close(mlp(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "bias", "names"),
    [
        (Activation.swiglu, False, ["gate.weight", "up.weight", "down.weight"]),
        (Activation.gelu, False, ["up.weight", "down.weight"]),
        (Activation.gelu, True, ["up.weight", "up.bias", "down.weight", "down.bias"]),
    ],
)
def test_has_only_the_parameters_of_its_kind(activation, bias, names):
    assert sorted(made(activation, bias).state_dict()) == sorted(names)
