"""Each family equals an independent implementation: logits, and the gradient of every parameter.

That is transformers 5.23, and for Grok 2.5, which it does not have, ``tests/plain_grok.py``.
``PARITY_DRAWS=60 pytest tests/zoo/test_parity.py`` tries more random shapes than the default, whose worst tensor uses
0.41 of the tolerance. Of 60 draws of each family 3 of 1,260 exceed it, by up to 1.9 (OLMo 2, DeepSeek-V2, Qwen3-Next):
that is rounding, as the same draws show in float64. So would be a tie of two experts, which fp32 may break either way.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from draws import DENSE
from draws_moe import MOE
from models import randomized
from parity import assert_near, gradients
from plain_grok import plain_grok
from reference import ours_of, reference_of
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.hf_places import places

DRAWS = int(os.environ.get("PARITY_DRAWS", "4"))
FAMILIES = DENSE | MOE
LENGTHS = {"qwen3_next": 71}  # past DeltaNet's chunks of 64
LENGTH = 33  # past windows, chunks, temperature floors and original contexts of all draws
NO_SDPA = {"gpt_oss": "transformers has its sinks in eager attention only", "grok2": "transformers does not have it"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Result:
    """What a model makes of tokens: logits, and gradients of the mean cross-entropy by our names."""

    logits: Tensor
    gradients: dict[str, Tensor]


def ours_on(model: nn.Module, tokens: Tensor, targets: Tensor) -> Result:
    logits = model(tokens)
    mean_loss(logits, targets).backward()
    return Result(logits.detach(), gradients(model))


def theirs_on(
    config: ModelConfig, state: Mapping[str, Tensor], tokens: Tensor, targets: Tensor, *, attention: str = "eager"
) -> Result:
    if config.family == "grok2":
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in state.items()}
        logits = plain_grok(config, leaves, tokens)
        mean_loss(logits, targets).backward()
        return Result(logits.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    model = reference_of(config, state, dtype=state["norm.weight"].dtype)
    model.set_attn_implementation(attention)
    logits = model(tokens).logits
    mean_loss(logits, targets).backward()
    return Result(logits.detach(), ours_of(config, gradients(model)))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def assert_same(got: Result, want: Result, *, share: float = 1.0) -> None:
    assert_near({"logits": got.logits}, {"logits": want.logits}, share=share)
    assert_near(got.gradients, want.gradients, share=share)


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_the_reference(family, seed):
    config = FAMILIES[family](seed)
    ours = randomized(config, seed=seed)
    tokens, targets = drawn_tokens(config, seed, length=LENGTHS.get(family, LENGTH))
    assert_same(ours_on(ours, tokens, targets), theirs_on(config, ours.state_dict(), tokens, targets))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_SDPA.keys()))
def test_logits_and_gradients_equal_those_of_transformers_with_sdpa(family):
    config = FAMILIES[family](101)
    ours = randomized(config, seed=101)
    tokens, targets = drawn_tokens(config, 101, length=LENGTHS.get(family, LENGTH))
    want = theirs_on(config, ours.state_dict(), tokens, targets, attention="sdpa")
    assert_same(ours_on(ours, tokens, targets), want)


@pytest.fixture
def fp32_means_float64(monkeypatch):
    """Transformers rounds norms, rotations and routers to fp32, so that its float64 is none: every fp32 is widened."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("fp32_means_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_differs_from_the_reference_in_fp32_is_rounding(family):
    config = FAMILIES[family](102)
    ours = randomized(config, seed=102, dtype=torch.float64)
    tokens, targets = drawn_tokens(config, 102, length=LENGTHS.get(family, LENGTH))
    got, want = ours_on(ours, tokens, targets), theirs_on(config, ours.state_dict(), tokens, targets)
    assert got.logits.dtype == want.logits.dtype == torch.float64
    assert_same(got, want, share=1e-7)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"grok2", "chameleon"}))  # whose class rounds once more
def test_norms_round_to_bf16_where_those_of_transformers_do(family):
    config = FAMILIES[family](103)
    ours = randomized(config, seed=103)
    theirs = reference_of(config, ours.state_dict()).to(torch.bfloat16)
    ours.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(103)
    gated = "linear_attn.norm.weight"  # one with DeltaNet's output gate
    keys = {name: spellings[-1][0].key for name, spellings in places(config).items() if name.endswith("norm.weight")}
    for name, key in keys.items():
        if not key.endswith(gated):
            norm, reference = (
                model.get_submodule(n.removesuffix(".weight")) for model, n in ((ours, name), (theirs, key))
            )
            x = 2 * torch.randn(64, norm.weight.shape[0], generator=generator).to(torch.bfloat16)
            assert torch.equal(norm(x), reference(x)), name


def drawn_tokens(config: ModelConfig, seed: int, *, length: int) -> Tensor:
    """Tokens and targets, (2, rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, 2, length), generator=generator)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_documents(family, seed):
    config = FAMILIES[family](seed)
    model = randomized(config, seed=seed, dtype=torch.float64)
    lengths = [1, 9, LENGTHS.get(family, 24), 2]
    tokens, targets = drawn_tokens(config, seed, length=sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(tokens)
    documents = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)]).expand_as(tokens)

    def run(call: Callable[[], Tensor]) -> Result:
        model.zero_grad(set_to_none=True)
        logits = call()
        mean_loss(logits, targets).backward()
        return Result(logits.detach(), gradients(model))

    packed = run(lambda: model(tokens, positions=positions, documents=documents))
    separate = run(lambda: torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1))
    torch.testing.assert_close(packed.logits, separate.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed.gradients, separate.gradients, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not torch.allclose(packed.logits, model(tokens), rtol=1e-3, atol=1e-3)  # the documents do matter
