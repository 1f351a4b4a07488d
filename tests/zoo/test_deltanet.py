"""Gated DeltaNet: transformers' layer, packed documents, narrow and no numbers."""

from collections import Counter

import pytest
import torch
from torch.autograd import grad
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from zoo import delta_fla
from zoo.config_mixer import DeltaNetConfig, NormConfig
from zoo.context import Context
from zoo.delta_rule import Rule, chunked
from zoo.deltanet import DeltaNet

D = 24


def make(*, G=2, R=2, K=8, V=6, taps=4, dtype=torch.float64, device="cpu"):
    """A layer, every parameter random."""
    sizes = {"n_k_heads": G, "n_v_heads": G * R, "k_dim": K, "v_dim": V, "conv": taps}
    with torch.device(device):
        layer = DeltaNet(DeltaNetConfig(**sizes, norm=NormConfig(eps=1e-6)), d_model=D).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters() if device == "cpu" else ():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # convolutions that keep their input's size, so that the ε of the unit length does not rule
        width = 1 if parameter.dim() == 1 or "conv" in name else parameter.shape[-1]
        parameter.data = (drawn * width**-0.5).to(dtype)
    return layer


def context(B, T, *, documents=None, dtype=torch.float64, device="cpu"):
    positions = torch.arange(T, device=device).expand(B, T)
    if documents is not None:
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        positions = positions - torch.where(starts, positions, 0).cummax(1).values
    return Context(positions=positions, documents=documents, dtype=dtype, length=T)


def draw(*shape, dtype=torch.float64, seed=1):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def by_our_names(theirs, *, G, R, K, V):
    """Tensors of transformers' layer by our names; it keeps q, k, v, z of a key head together, and so b, a."""
    q, k, v, z = theirs["in_proj_qkvz.weight"].view(G, -1, D).split([K, K, R * V, R * V], dim=1)
    b, a = theirs["in_proj_ba.weight"].view(G, 2 * R, D).split(R, dim=1)
    convolutions = theirs["conv1d.weight"][:, 0].split([G * K, G * K, G * R * V])
    ours = {"wq": q, "wk": k, "wv": v, "wg": z, "wb": b, "wa": a}
    return {
        **{f"{name}.weight": tensor.flatten(0, 1) for name, tensor in ours.items()},
        **{f"conv_{name}.weight": each for name, each in zip("qkv", convolutions, strict=True)},
        "log_decay": theirs["A_log"],
        "dt_bias": theirs["dt_bias"],
        "norm.weight": theirs["norm.weight"],
        "wo.weight": theirs["out_proj.weight"],
    }


def reference(*, G, R, K, V, dtype):
    """Transformers' layer, every parameter random, and ours with its numbers."""
    sizes = {"linear_num_key_heads": G, "linear_num_value_heads": G * R, "linear_key_head_dim": K}
    config = Qwen3NextConfig(hidden_size=D, linear_value_head_dim=V, linear_conv_kernel_dim=4, **sizes)
    theirs, ours = Qwen3NextGatedDeltaNet(config, 0), make(G=G, R=R, K=K, V=V, dtype=dtype)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        width = 1 if parameter.dim() != 2 else parameter.shape[-1]
        torch.nn.init.normal_(parameter, std=width**-0.5)
    theirs = theirs.to(dtype)
    ours.load_state_dict(by_our_names(theirs.state_dict(), G=G, R=R, K=K, V=V))
    return theirs, ours


# Keys of few numbers are near zero by chance, where the gradient of their direction amplifies rounding: at width 4
# each of the two layers is 1e-5 from float64.
@pytest.mark.parametrize("length", [1, 70, 130])
@pytest.mark.parametrize("sizes", [(2, 2, 32, 24), (3, 1, 32, 32), (1, 4, 48, 16)], ids=str)
def test_it_equals_transformers_with_all_gradients(sizes, length):
    named = dict(zip(("G", "R", "K", "V"), sizes, strict=True))
    theirs, ours = reference(**named, dtype=torch.float32)
    x, pull = draw(2, length, D, dtype=torch.float32), draw(2, length, D, dtype=torch.float32, seed=2)
    right, found = theirs(x), ours(x, context(2, length, dtype=torch.float32))
    their_grads = dict(theirs.named_parameters())
    their_grads = dict(zip(["x", *their_grads], grad(right, [x, *their_grads.values()], pull), strict=True))
    our_names = dict(ours.named_parameters())
    our_grads = dict(zip(["x", *our_names], grad(found, [x, *our_names.values()], pull), strict=True))
    expected = {"y": right, "x": their_grads["x"], **by_our_names(their_grads, **named)}
    assert expected.keys() == {"y", *our_grads}
    largest = max(each.abs().max() for each in expected.values())
    for name, value in {"y": found, **our_grads}.items():
        far = (value - expected[name]).abs().max()
        assert far <= 1e-5 * expected[name].abs().max() + 1e-6 * largest, f"{name}: {far}"


def test_bf16_is_as_near_to_fp32_as_transformers_is():
    named = {"G": 2, "R": 2, "K": 8, "V": 6}
    theirs, ours = reference(**named, dtype=torch.bfloat16)
    x = draw(2, 130, D, dtype=torch.bfloat16).detach()
    exact = make(**named, dtype=torch.float32)
    exact.load_state_dict(ours.state_dict())
    y = exact(x.float(), context(2, 130, dtype=torch.float32))
    found, right = ours(x, context(2, 130, dtype=torch.bfloat16)), theirs(x)
    assert found.dtype is torch.bfloat16
    distance = [(each.float() - y).square().mean().sqrt() for each in (found, right)]
    assert distance[0] < 1.1 * distance[1] and distance[1] < 0.05 * y.square().mean().sqrt()


def test_weights_kept_in_fp32_act_as_if_rounded_to_the_inputs_bf16():
    layer, x = make(dtype=torch.float32), draw(2, 70, D, dtype=torch.bfloat16)
    y = layer(x, context(2, 70, dtype=torch.bfloat16))
    assert torch.equal(layer.bfloat16()(x, context(2, 70, dtype=torch.bfloat16)), y)


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4, 5, 6], [3, 0, 3, 0, 3, 0, 3]], ids=["rising", "in turns"])
def test_packed_documents_equal_separate_ones(numbers):
    lengths = [1, 2, 67, 1, 1, 64, 9]
    layer, x = make(), draw(1, sum(lengths), D)
    documents = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))[None]
    packed = layer(x, context(1, x.shape[1], documents=documents))
    parts = [layer(part, context(1, part.shape[1])) for part in x.split(lengths, dim=1)]
    separate = torch.cat(parts, dim=1)
    assert (packed - separate).abs().max() < 1e-12
    pull, inputs = draw(*x.shape, seed=2), [x, *layer.parameters()]
    for found, right in zip(grad(packed, inputs, pull), grad(separate, inputs, pull), strict=True):
        assert (found - right).abs().max() < 1e-12 * right.abs().max().clamp(min=1)


def test_rows_of_a_batch_do_not_touch():
    layer, x = make(), draw(2, 70, D)
    documents = torch.stack([torch.arange(70) // 9, torch.arange(70) // 40])
    both = layer(x, context(2, 70, documents=documents))
    for row in range(2):
        alone = layer(x[row : row + 1], context(1, 70, documents=documents[row : row + 1]))
        assert (both[row] - alone[0]).abs().max() < 1e-12


def test_a_token_sees_none_after_it():
    layer, x = make(), draw(1, 130, D)
    y = layer(x, context(1, 130))
    (pull,) = grad(y[0, 65].sum(), x)
    assert pull[0, 66:].abs().max() == 0 and pull[0, :66].abs().amax(-1).min() > 0


@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_backward_ask_nothing_of_a_device(packed):
    """On the meta device numbers cannot be read: a loop over documents would fail there."""
    layer = make(dtype=torch.bfloat16, device="meta")
    documents = torch.zeros(2, 130, dtype=torch.int64, device="meta") if packed else None
    x = torch.zeros(2, 130, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = layer(x, context(2, 130, documents=documents, dtype=torch.bfloat16, device="meta"))
    assert y.shape == x.shape and y.dtype is torch.bfloat16
    y.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_the_chosen_kernel_gets_the_same_question(monkeypatch, packed):
    asked = Counter()

    def stand_in(*tensors, beta, decay, ends):
        asked["fla"] += 1
        assert (ends is not None) == packed
        numbers = torch.zeros(1, 70, dtype=torch.int64)
        if ends is not None:
            numbers = torch.searchsorted(ends[1:], torch.arange(70), right=True)[None]
        return chunked(*tensors, beta=beta, decay=decay, documents=numbers)

    monkeypatch.setattr(delta_fla, "chunked", stand_in)
    layer, x = make(), draw(1, 70, D)
    surroundings = context(1, 70, documents=(torch.arange(70) // 30)[None] if packed else None)
    expected = layer(x, surroundings)
    assert layer.chosen is Rule.torch and not asked
    layer.chosen = Rule.fla
    assert (layer(x, surroundings) - expected).abs().max() < 1e-12 and asked["fla"] == 1
