"""Multi-token prediction against its formulas written out in float64, and what a prediction may have seen."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import randomized
from safetensors.torch import load_file
from sharing import ADAMW, EXPERTS, LENGTH, SETTINGS, VOCAB, attention, shrunk
from torch import Tensor

from data.batch import Batch, assemble
from data.rows import Rows
from parallel.config_fit import Sizes
from parallel.mesh import open_mesh
from trainer.engine import TorchEngine, count
from zoo import hf
from zoo.context import Context
from zoo.decoder import Decoder, Objective, positions_within

ROWS = 4
MLA = {"n_heads": 4, "q_rank": 10, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5}
DELTA = {"n_k_heads": 4, "n_v_heads": 8, "k_dim": 6, "v_dim": 5}


def small(family: str, *, depths: int) -> Decoder:
    """A family's model with every number random, in float64."""
    moe = EXPERTS | {"d_shared": 16}  # a multiple of d_expert, as exports need it
    parts = {
        "deepseek_v3": {"mla": MLA, "mlp": {"d_ff": 24}, "moe": moe | {"router__n_groups": 4, "router__top_groups": 2}},
        "glm45": attention() | {"moe": moe},
        "qwen3_next": attention() | {"deltanet": DELTA, "moe": moe},
    }[family]
    layers = 4 if family == "qwen3_next" else 3  # so that the last has attention, as in the published model
    return randomized(shrunk(f"{family}_tiny", parts, n_mtp=depths, n_layers=layers), seed=depths, dtype=torch.float64)


def drawn(depths: int, *, documents: bool = True) -> Rows:
    """Rows with what their last targets need; documents end where they like."""
    generator = np.random.default_rng(depths)
    shape = (ROWS, LENGTH + 1 + depths)
    return Rows(tokens=generator.integers(0, VOCAB, shape), starts=generator.random(shape) < (0.15 if documents else 0))


def numbered(rows: Rows) -> Tensor:
    """The document of every token, look-ahead included. A row's first token begins nothing new."""
    starts = torch.from_numpy(rows.starts).clone()
    starts[:, 0] = False
    return starts.long().cumsum(dim=1)


def scaled(x: Tensor, weight: Tensor, model: Decoder) -> Tensor:
    norm = model.config.norm
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * (weight + norm.offset)


def written_out(model: Decoder, rows: Rows) -> Tensor:
    """(1 + depths,) mean losses, by DeepSeek-V3's equations 21 to 25 (arXiv 2412.19437), halves in the released order.

    Blocks are the model's own; they equal transformers' in other tests. What stands between is here in full: for depth
    k and position i, h'_i = M_k [norm(Emb(t_{i+k})); norm(h_i of depth k-1)], h_i = norm(Block_k(h')_i), and
    softmax(Head h_i) is of t_{i+k+1}, which counts where it is of the document of t_i.
    """
    p, tokens, documents = dict(model.named_parameters()), torch.from_numpy(rows.tokens), numbered(rows)
    here = documents[:, :LENGTH]
    context = Context(positions_within(here, split=True), here, torch.float64, model.config.context)
    x = p["embed.weight"][tokens[:, :LENGTH]]
    for block in model.layers():
        x, _ = block(x, context)
    h = scaled(x, p["norm.weight"], model)
    head, means = p["head.weight"], []
    for k in range(model.config.n_mtp + 1):
        if k:
            at = f"mtp.{k - 1}."
            ahead = p["embed.weight"][tokens[:, k : LENGTH + k]]
            left = scaled(ahead, p[f"{at}embed_norm.weight"], model)
            right = scaled(h, p[f"{at}hidden_norm.weight"], model)
            x = torch.cat([left, right], dim=-1) @ p[f"{at}proj.weight"].t()
            x, _ = model.depths()[k - 1].block(x, context)
            h = scaled(x, p[f"{at}norm.weight"], model)
        scores = h @ head.t()
        gathered = scores.gather(2, tokens[:, k + 1 : LENGTH + k + 1, None])[..., 0]
        counts = documents[:, k + 1 : LENGTH + k + 1] == here
        means.append((scores.logsumexp(dim=2) - gathered)[counts].mean())
    return torch.stack(means)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm45", "qwen3_next"])
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_losses_and_gradients_are_those_of_the_formulas(family, depths):
    model, rows, weight = small(family, depths=depths), drawn(depths), 0.3
    want = written_out(model, rows)
    (want[0] + weight / depths * want[1:].sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    batch, mesh = assemble(rows, n_mtp=depths), open_mesh(Sizes(1, 1), rank=0, local_rank=0)
    halves = [Batch(**{key: x[i : i + 2] for key, x in vars(batch).items()}) for i in (0, 2)]
    engine = TorchEngine(model, mesh=mesh, train=SETTINGS, optim_config=ADAMW)
    engine.weigh(mtp_weight=weight)
    counts = count(halves, mesh)
    counts.rows.fill_(math.inf)  # which divides the balance losses
    terms = engine.forward_backward(halves, counts)
    torch.testing.assert_close(terms.losses, want.detach(), rtol=1e-12, atol=0)
    assert counts.targets.min() > 10 and counts.targets.diff().max() < 0
    for name, parameter in model.named_parameters():
        far = (parameter.grad - gradients[name]).abs().max()
        assert far <= 1e-10 * gradients[name].abs().max() + 1e-14, name
    assert all(parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters() if "mtp" in name)


def scores(model: Decoder, rows: Rows) -> list[Tensor]:
    """(B, T, V) logits of the main prediction and of each depth, as training makes them."""
    batch, seen = assemble(rows, n_mtp=model.config.n_mtp), []

    def loss(h: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None) -> Tensor:
        seen.append(F.linear(h, weight).unflatten(0, batch.tokens.shape))
        return seen[-1].sum()

    with torch.no_grad():
        objective = Objective(batch.targets, batch.mtp_tokens, batch.mtp_targets, None, loss)
        model(batch.tokens, positions=batch.positions, documents=batch.documents, objective=objective)
    return seen


@pytest.mark.parametrize("family, depths", [("deepseek_v3", 3), ("glm45", 2), ("qwen3_next", 2)])
def test_a_prediction_has_seen_nothing_of_what_it_predicts_or_what_follows(family, depths):
    model, rows = small(family, depths=depths), drawn(depths, documents=False)
    before = scores(model, rows)
    for changed in range(depths + 1, LENGTH + 1 + depths, 3):
        tokens = rows.tokens.copy()
        tokens[:, changed:] = (tokens[:, changed:] + 1 + np.arange(tokens.shape[1] - changed) % 7) % VOCAB
        for k, (old, new) in enumerate(zip(before, scores(model, Rows(tokens, rows.starts)), strict=True)):
            far = (new - old).abs().amax(dim=(0, 2))  # of each position i, which predicts token i+k+1
            blind = [i for i in range(LENGTH) if i + k + 1 <= changed]
            assert far[blind].max() < 1e-12, f"depth {k}, token {changed}"
            if changed - k < LENGTH:  # position changed-k has seen the first changed token: it is its latest
                assert far[changed - k] > 1e-6, f"depth {k}, token {changed}"


def test_a_prediction_has_seen_nothing_of_another_document():
    model, rows = small("deepseek_v3", depths=2), drawn(2)
    documents, before = numbered(rows), scores(model, rows)
    targets = assemble(rows, n_mtp=2)
    counted = [targets.targets >= 0, *(targets.mtp_targets >= 0).unbind(dim=1)]
    row = next(row for row in range(ROWS) if documents[row, -1] > 1)
    for number in range(int(documents[row, -1]) + 1):
        tokens = rows.tokens.copy()
        there = (documents[row] == number).numpy()
        tokens[row, there] = (tokens[row, there] + 5) % VOCAB
        for k, (old, new) in enumerate(zip(before, scores(model, Rows(tokens, rows.starts)), strict=True)):
            far = (new - old).abs().amax(dim=2)[row]
            elsewhere = counted[k][row] & (documents[row, :LENGTH] != number)
            assert not elsewhere.any() or far[elsewhere].max() < 1e-12
            inside = counted[k][row] & (documents[row, :LENGTH] == number)
            assert not inside.any() or far[inside].min() > 1e-6


@pytest.mark.parametrize("family", ["deepseek_v3", "glm45"])
@pytest.mark.parametrize("depths", [1, 2])
def test_each_depth_is_exported_as_a_layer_after_the_last(tmp_path, family, depths):
    model = small(family, depths=depths).float()
    hf.save(model, tmp_path)
    stored, state = {}, model.state_dict()
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    for depth in range(depths):
        theirs, ours = f"model.layers.{model.config.n_layers + depth}.", f"mtp.{depth}."
        for their, our in (("eh_proj", "proj"), ("enorm", "embed_norm"), ("hnorm", "hidden_norm")):
            assert torch.equal(stored[f"{theirs}{their}.weight"], state[f"{ours}{our}.weight"])
        assert torch.equal(stored[f"{theirs}shared_head.norm.weight"], state[f"{ours}norm.weight"])
    again = hf.load(tmp_path)
    assert again.config.n_mtp == depths
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
