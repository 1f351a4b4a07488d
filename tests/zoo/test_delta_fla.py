"""How flash-linear-attention's kernel is chosen and called; a stand-in computes in its place."""

import sys
from types import ModuleType

import pytest
import torch

from zoo import delta_fla, delta_rule
from zoo.delta_fla import choose
from zoo.delta_rule import Rule

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(delta_fla, "version", lambda name: {"fla-core": "0.6.0"}[name])


@pytest.fixture
def called(monkeypatch):
    """Puts a kernel with the arguments of 0.6.0 in the library's place, and lists what it was given."""
    calls = []

    def chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False,
        state_v_first=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
        chunk_indices=None,
        cp_context=None,
    ):
        calls.append({"shape": tuple(q.shape), "ends": cu_seqlens})
        assert use_qk_l2norm_in_kernel and not use_beta_sigmoid_in_kernel and not output_final_state
        assert scale == q.shape[-1] ** -0.5 and v.shape[2] % q.shape[2] == 0
        assert cu_seqlens is None or (q.shape[0] == 1 and cu_seqlens.dtype in (torch.int32, torch.int64))
        documents = None
        if cu_seqlens is not None:
            documents = torch.searchsorted(cu_seqlens[1:], torch.arange(q.shape[1]), right=True)[None]
        return delta_rule.recurrent(q, k, v, beta=beta, decay=g, documents=documents), None

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    return calls


def draw(B, T, G, H, K, V):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, G, K), (B, T, G, K), (B, T, H, V), (B, T, H), (B, T, H)]
    q, k, v, beta, decay = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (q, k, v), {"beta": beta.sigmoid(), "decay": -decay.abs()}


def test_whole_rows_are_given_as_they_are(called):
    tensors, others = draw(2, 9, 2, 4, 4, 6)
    y = delta_fla.chunked(*tensors, **others, ends=None)
    assert (y - delta_rule.chunked(*tensors, **others, documents=None)).abs().max() < 1e-12
    assert called == [{"shape": (2, 9, 2, 4), "ends": None}]


def test_documents_are_given_as_one_row_with_their_ends(called):
    tensors, others = draw(2, 5, 2, 4, 4, 6)
    ends = torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32)
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    y = delta_fla.chunked(*tensors, **others, ends=ends)
    assert (y - delta_rule.chunked(*tensors, **others, documents=documents)).abs().max() < 1e-12
    assert called[0]["shape"] == (1, 10, 2, 4) and called[0]["ends"] is ends


def test_the_kernel_is_chosen_where_it_runs(installed):
    assert choose(CUDA, dtype=torch.bfloat16, k_dim=128) is Rule.fla
    assert choose(CUDA, dtype=torch.bfloat16, k_dim=128, wanted=Rule.fla) is Rule.fla
    assert choose(CUDA, dtype=torch.bfloat16, k_dim=128, wanted=Rule.torch) is Rule.torch
    assert choose(CUDA, dtype=torch.float64, k_dim=128) is Rule.torch
    assert choose(CUDA, dtype=torch.bfloat16, k_dim=512) is Rule.torch
    assert choose(CPU, dtype=torch.bfloat16, k_dim=128) is Rule.torch


@pytest.mark.parametrize(
    ("device", "dtype", "k_dim", "why"),
    [
        (CPU, torch.bfloat16, 128, "runs on cuda, not on cpu"),
        (CUDA, torch.float32, 128, "in bf16 or fp16, not in torch.float32"),
        (CUDA, torch.bfloat16, 512, "at most 256 numbers, not 512"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_with_the_reason(installed, device, dtype, k_dim, why):
    with pytest.raises(ValueError, match=why):
        choose(device, dtype=dtype, k_dim=k_dim, wanted=Rule.fla)


@pytest.mark.parametrize("found", [None, "0.5.3"])
def test_a_missing_or_old_library_is_refused_with_how_to_install_it(monkeypatch, found):
    def version(name):
        if found is None:
            raise delta_fla.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(delta_fla, "version", version)
    assert choose(CUDA, dtype=torch.bfloat16, k_dim=128) is Rule.torch
    with pytest.raises(ValueError, match=r"pip install 'fla-core\[cuda\]>=0.6'"):
        choose(CUDA, dtype=torch.bfloat16, k_dim=128, wanted=Rule.fla)
