"""Muon on one process: torch's own for plain matrices, each logical weight by itself, for which groups."""

import json
import math
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from models import SHIPPED
from models import compose as composed_model
from sharing import ADAMW, ALONE, FAMILIES, MUON, Case
from torch import nn

from conf import schema
from launch.world import World
from parallel import plan
from parallel.owners import Matrix
from train import train
from trainer import groups, newton_schulz, optim
from trainer.config import OptimConfig, OptimKind
from trainer.groups import Role
from trainer.muon import Muon, Weight
from zoo.decoder import Decoder

NUMBERS = MUON.muon
CONF = Path(__file__).parents[2] / "conf"
SHAPES = [(8, 20), (20, 8), (20, 8), (33, 17), (64, 64), (64, 64), (64, 64), (1, 12), (96, 31)]


def plain(name, shape):
    return Matrix(name, tuple(shape), None, period=shape[0], first=0, width=shape[0])


def muon(parameters, config=NUMBERS, matrices=None, weight_decay=0.1):
    weights = [
        Weight(p, p.detach(), [plain(str(i), p.shape)] if matrices is None else matrices[i])
        for i, p in enumerate(parameters)
    ]
    device = torch.device("cpu")
    return Muon(weights, config=config, lr=0.02, weight_decay=weight_decay, stage=None, copies=1, device=device)


def steps(optimizer, parameters, n=5):
    for step in range(n):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if i == 2:
                p.grad.zero_()
        optim.set_lr(optimizer, 0.02 / (1 + step))
        optimizer.step()


def drawn(shapes):
    generator = torch.Generator().manual_seed(9)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


OPTIONS = [
    {},
    {"nesterov": False},
    {"momentum": 0.0},
    {"momentum": 0.5, "ns_steps": 1, "coefficients": [2.0, -1.5, 0.5]},
    {"nesterov": False, "ns_steps": 7, "coefficients": [1.875, -1.25, 0.375]},
    {"weight_decay": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_matrices_are_updated_bitwise_as_by_torch(options):
    ours, theirs, start = drawn(SHAPES), drawn(SHAPES), drawn(SHAPES)
    decay = {"weight_decay": options.get("weight_decay", 0.1)}
    config = replace(NUMBERS, **{key: value for key, value in options.items() if key != "weight_decay"})
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=config.momentum, nesterov=config.nesterov, ns_steps=config.ns_steps,
        ns_coefficients=tuple(config.coefficients), adjust_lr_fn="match_rms_adamw", **decay,
    )  # fmt: skip
    steps(muon(ours, config, **decay), ours)
    steps(reference, theirs)
    for i, (got, want, before) in enumerate(zip(ours, theirs, start, strict=True)):
        assert torch.equal(got, want)
        assert i == 2 or not torch.equal(got, before)  # the third has gradients of zeros


def test_a_parameter_without_a_gradient_goes_on_as_with_a_gradient_of_zeros():
    some, others = drawn(SHAPES[:2]), drawn(SHAPES[:2])
    optimizers = muon(some), muon(others)
    for step in range(3):
        for i, (p, q) in enumerate(zip(some, others, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
            if (i, step) in ((0, 0), (1, 2)):
                p.grad, q.grad = None, torch.zeros_like(q)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(some, others, strict=True))


def test_each_expert_is_orthogonalised_by_itself():
    bank = drawn([(4, 12, 8)])[0]
    apart = [nn.Parameter(each.clone()) for each in bank.detach()]
    optimizer = muon([bank], matrices=[[Matrix("0", (4, 12, 8), e, 12, 0, 12) for e in range(4)]])
    others = muon(apart)
    gradients = torch.randn(3, 4, 12, 8)
    for gradient in gradients:
        bank.grad = gradient.clone()
        for p, g in zip(apart, gradient, strict=True):
            p.grad = g.clone()
        optimizer.step()
        others.step()
    assert torch.equal(bank.detach(), torch.stack([p.detach() for p in apart]))


def test_keys_and_values_of_all_heads_are_two_matrices():
    fused = drawn([(15, 6)])[0]  # three heads of 2 rows of keys and 3 of values
    keys, values = torch.arange(15) % 5 < 2, torch.arange(15) % 5 >= 2
    apart = [nn.Parameter(fused.detach()[rows].clone()) for rows in (keys, values)]
    optimizer = muon([fused], matrices=[[Matrix("0", (15, 6), None, 5, 0, 2), Matrix("0", (15, 6), None, 5, 2, 3)]])
    others = muon(apart)
    for gradient in torch.randn(3, 15, 6):
        fused.grad = gradient.clone()
        for p, rows in zip(apart, (keys, values), strict=True):
            p.grad = gradient[rows].clone()
        optimizer.step()
        others.step()
    assert torch.equal(fused.detach()[keys], apart[0]) and torch.equal(fused.detach()[values], apart[1])


@pytest.mark.parametrize("n, m", [(12, 30), (30, 12), (16, 16)])
def test_float64_comes_near_the_orthogonal_matrix_of_an_svd_and_bf16_near_float64(n, m):
    torch.manual_seed(n)
    x = torch.randn(3, n, m, dtype=torch.float64)
    run = {"coefficients": NUMBERS.coefficients, "steps": 5}
    y = newton_schulz.orthogonal(x, **run)
    assert y.dtype is torch.float64
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.3 and values.max() < 1.3
    # The same singular vectors: what is left between them is diagonal.
    middle = u.mT @ y @ v.mT
    assert (middle - torch.diag_embed(middle.diagonal(dim1=1, dim2=2))).abs().max() < 1e-10
    narrow = newton_schulz.orthogonal(x.bfloat16(), **run)
    assert (narrow.double() - y).norm() / y.norm() < 0.06


def test_the_classical_coefficients_reach_the_orthogonal_matrix():
    torch.manual_seed(0)
    x = torch.randn(2, 10, 14, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    got = newton_schulz.orthogonal(x, coefficients=[1.875, -1.25, 0.375], steps=40)
    torch.testing.assert_close(got, u @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n, m", [(24, 40), (4, 255), (255, 4), (3, 400), (2, 512), (8, 8)])
def test_a_matrix_comes_out_the_same_whatever_is_beside_it(n, m, dtype):
    """Of 4 x 255 and 3 x 400 in bf16, batched products differ from single ones."""
    run = {"coefficients": NUMBERS.coefficients, "steps": 5}
    for seed in range(12):
        x = torch.randn(8, n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        together = newton_schulz.orthogonal(x, **run)
        for some in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 8)):
            assert torch.equal(newton_schulz.orthogonal(x[some], **run), together[some])


@pytest.mark.parametrize("n, m", [(24, 40), (40, 24), (16, 16)])
def test_products_of_many_at_a_time_are_those_of_each(n, m):
    """What a GPU does, in float64 on this CPU."""
    x = torch.randn(11, n, m, dtype=torch.float64)
    each = newton_schulz.orthogonal(x, coefficients=NUMBERS.coefficients, steps=5)
    many = [newton_schulz._filled_up(some, 8, NUMBERS.coefficients, 5) for some in x.split(8)]
    torch.testing.assert_close(torch.cat(many), each, rtol=0, atol=1e-13)


def test_an_update_of_lr_1_has_the_root_mean_square_of_adamw():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(96, 160, dtype=torch.float64))
    p.grad = torch.randn_like(p)
    muon([p]).step()
    rms = p.detach().square().mean().sqrt() / 0.02
    assert rms == pytest.approx(0.2, rel=0.2)  # singular values are 1 only about


TINY = [name for name in SHIPPED if name.endswith("_tiny")]


def test_all_families_are_here():
    assert len(TINY) == 21


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_a_role_and_matrices_that_hold_each_number_once(name):
    config = composed_model(name)
    with torch.device("meta"):
        shapes = {key: p.shape for key, p in Decoder(config).named_parameters()}
    lines = groups.table(shapes, config=config, optim=MUON)
    assert sum(line.tensors for line in lines) == len(shapes)
    assert sum(line.numbers for line in lines) == sum(shape.numel() for shape in shapes.values())
    for key, shape in shapes.items():
        what = groups.role(key, config=config)
        named = {role for pattern, role in groups.ROLES if fnmatchcase(plan.key(key, config=config), pattern)}
        assert what in named and (what is not Role.matrix or named == {what}), key
        muon = groups.group(key, shape, config=config, kind=OptimKind.muon).optimizer is OptimKind.muon
        assert muon == (what is Role.matrix) and (not muon or len(shape) in (2, 3))
        if what is not Role.matrix:
            assert len(shape) < 2 or "weight" in key or "bias" in key
            continue
        found = groups.matrices(key, shape, config=config)
        assert sum(math.prod(each.size) for each in found) == shape.numel()
        rows = [each.rows(tuple((0, n) for n in shape)) for each in found]
        if rows[0] is not None:
            assert sorted(row for part in rows for row in part) == list(range(shape[0]))


def test_the_table_says_what_gets_which_optimizer():
    config = FAMILIES["deepseek_v3"]()
    lines = {line.group.role: line for line in _lines(config, MUON)}
    assert {role for role, line in lines.items() if line.group.optimizer is OptimKind.muon} == {Role.matrix}
    assert lines[Role.norm].weight_decay == 0 and lines[Role.matrix].weight_decay == 0.1
    per_layer = 2 + 1 + 2 + 2 + 1  # wq, wq_down, wkv, wkv_down and wo of latent attention
    n_moe = sum(layer.moe is not None for layer in config.layers) + config.n_mtp
    dense = config.n_layers + config.n_mtp - n_moe
    mixers = (config.n_layers + config.n_mtp) * per_layer
    assert lines[Role.matrix].matrices == mixers + 3 * dense + n_moe * (1 + 3 + 3 * 8) + config.n_mtp
    text = optim.table(config, MUON)
    assert "muon" in text and len(text.splitlines()) == 1 + len(lines)
    assert {line.group.optimizer for line in _lines(config, ADAMW)} == {OptimKind.adamw}


def _lines(config, settings):
    with torch.device("meta"):
        shapes = {key: p.shape for key, p in Decoder(config).named_parameters()}
    return groups.table(shapes, config=config, optim=settings)


@pytest.mark.parametrize("name", ["chameleon", "gpt_oss", "qwen3_next"])
def test_biases_norms_and_filters_of_two_dimensions_are_no_matrices(name):
    config = FAMILIES[name]()
    for key, shape in Decoder(config).named_parameters():
        if key.endswith("bias") or "norm" in key or "conv" in key or "embed.weight" in key or key == "head.weight":
            assert groups.group(key, shape.shape, config=config, kind=OptimKind.muon).optimizer is OptimKind.adamw


def test_state_is_momentum_for_matrices_and_two_moments_for_all_else():
    case = Case("llama3", ALONE, optim_config=MUON)
    named = dict(case.model.named_parameters())
    before = {key: p.detach().clone() for key, p in named.items()}
    case.update(0)
    assert all(not torch.equal(p, before[key]) for key, p in named.items())
    state = case.engine.state()["optimizer"]
    for key in named:
        matrix = groups.role(key, config=case.config) is Role.matrix
        assert set(state[key]) == ({"momentum_buffer"} if matrix else {"step", "exp_avg", "exp_avg_sq"})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"momentum": 1.0}, "optim.muon.momentum=1.0"),
        ({"ns_steps": 0}, "optim.muon.ns_steps=0"),
        ({"coefficients": [1.0, 2.0]}, "optim.muon.coefficients"),
        ({"update_rms": 0.0}, "optim.muon.update_rms=0.0"),
    ],
)
def test_what_is_no_number_of_muon_is_refused_by_its_key(change, said):
    with pytest.raises(ValueError, match=said):
        replace(NUMBERS, **change)


def test_muon_has_its_numbers_and_adamw_has_none():
    with pytest.raises(ValueError, match="optim.muon=null"):
        replace(MUON, muon=None)
    with pytest.raises(ValueError, match="optim.muon="):
        replace(ADAMW, muon=NUMBERS)
    assert isinstance(MUON, OptimConfig)


def composed(*words):
    GlobalHydra.instance().clear()
    schema.register()
    with initialize_config_dir(str(CONF), version_base=None):
        return schema.resolve(compose("train", overrides=["model=llama3_tiny", "data=synthetic", "run_dir=x", *words]))


def test_optim_muon_has_published_numbers_and_its_keys_can_be_set():
    found = composed("optim=muon", "optim.muon.momentum=0.9").optim
    assert found.kind is OptimKind.muon and found.muon == replace(NUMBERS, momentum=0.9)
    assert composed().optim.muon is None
    with pytest.raises(schema.ConfigError, match="optim.muon=null: must be given where optim.kind=muon"):
        composed("optim.kind=muon")


def test_a_run_with_muon_learns_and_begins_with_its_table(tmp_path, capfd):
    settings = [
        "optim=muon", "train.steps=6", "train.seq_len=32", "train.global_batch=8", "train.micro_batch=8",
        "model.d_model=48", "model.n_layers=2", "model.blocks.dense.mlp.d_ff=64",
        "train.eval_every=0", "log.wandb=disabled", f"run_dir={tmp_path}",
    ]  # fmt: skip
    run = composed(*settings)
    train(run, sizes=schema.check(run, world_size=1), place=World(rank=0, size=1, local_rank=0))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert "muon" in capfd.readouterr().err
