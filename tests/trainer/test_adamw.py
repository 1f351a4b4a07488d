"""AdamW with moments in bf16: a plain computation, every plan bitwise, checkpoints, bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import run
from models import compose
from saving import alone as saved_alone
from saving import grouped
from sharing import ADAMW, ALONE, MUON, Case, merged, same
from sharing import SETTINGS as SHARED
from torch import nn

from parallel import reduce
from parallel.config import Dtype, ParallelConfig, PipelineConfig, PrecisionConfig, ScheduleName
from planner import dryrun
from planner.config import DeviceKind, HardwareConfig
from trainer import adamw
from trainer.adamw import NarrowAdamW
from trainer.config import Moments
from trainer.manifest import CheckpointError

NARROW = replace(ADAMW, moments=Moments.bf16)
SHAPES = [(5, 3), (7,), (2, 3, 4), (1, 9)]
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
PLANS = {
    "fsdp 2": (ParallelConfig(1, 2), 2),
    "tp 2": (ParallelConfig(1, 1, tp=2), 2),
    "tp 2 x fsdp 2": (ParallelConfig(1, 2, tp=2), 4),
    "ep 2 x tp 2": (ParallelConfig(1, 2, ep=2, tp=2), 4),
    "hsdp 2 x 2": (ParallelConfig(2, 2), 4),
    "pp 2 zbv x fsdp 2": (ParallelConfig(1, 2, pp=2, pipeline=PipelineConfig(ScheduleName.zbv)), 4),
}


def drawn(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def updated(dtype=torch.float64, n=6, betas=(0.9, 0.95)):
    """Parameters and optimizer after some updates, the second half of the parameters without decay."""
    parameters = [nn.Parameter(x) for x in drawn(0, dtype)]
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = NarrowAdamW(groups, **SETTINGS | {"betas": betas})
    for step in range(n):
        for p, g in zip(parameters, drawn(step + 1, dtype), strict=True):
            p.grad = g
        optimizer.step()
    return parameters, optimizer


def to_bf16(x):
    """To the nearest number of eight binary digits, ties to even."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 2**8), exponent - 8)


def test_updates_are_those_of_a_plain_computation():
    parameters, optimizer = updated()
    values = [x.numpy() for x in drawn(0)]
    for i, p in enumerate(values):
        decay, m, v = (0.1 if i < 2 else 0.0), np.zeros_like(p), np.zeros_like(p)
        for t in range(1, 7):
            g = drawn(t)[i].numpy()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            p = p - 0.01 * decay * p
            p = p - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            m, v = to_bf16(m), to_bf16(v)
        got, state = parameters[i], optimizer.state[parameters[i]]
        np.testing.assert_allclose(got.detach().numpy(), p, rtol=1e-12, atol=1e-14)
        for key, moment in (("exp_avg", m), ("exp_avg_sq", v)):
            assert state[key].dtype is torch.bfloat16
            np.testing.assert_array_equal(state[key].double().numpy(), moment)


def test_the_first_update_is_that_of_torch():
    ours, _ = updated(torch.float32, n=1)
    theirs = [nn.Parameter(x) for x in drawn(0, torch.float32)]
    reference = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}],
        **SETTINGS, weight_decay=0.1)  # fmt: skip
    for p, g in zip(theirs, drawn(1, torch.float32), strict=True):
        p.grad = g
    reference.step()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_how_tensors_are_cut_moves_no_bit(chunk, dtype, monkeypatch):
    want, _ = updated(dtype)
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    got, _ = updated(dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_more_is_wide_at_a_time_than_a_chunk(monkeypatch):
    monkeypatch.setattr(adamw, "CHUNK", 8)
    sizes = [[x.numel() for (x,) in adamw._pieces([torch.zeros(shape)])] for shape in [(5, 3), (9,), (2, 3, 4), (0, 3)]]
    assert sizes == [[6, 6, 3], [8, 1], [12, 12], [0]]


def test_a_parameter_without_gradient_stays():
    parameters, optimizer = updated(n=1)
    before = [p.detach().clone() for p in parameters]
    parameters[0].grad = None
    optimizer.step()
    kept = [torch.equal(a, b) for a, b in zip(parameters, before, strict=True)]
    assert kept == [True, False, False, False]
    assert [optimizer.state[p]["step"].item() for p in parameters] == [1, 2, 2, 2]


@pytest.mark.parametrize("beta2, shrinks", [(0.95, True), (1 - 2**-8, True), (0.999, False)])
def test_rounding_undoes_a_decay_that_is_too_small(beta2, shrinks):
    # With beta2 0.999 a second moment never comes down again: such a choice is refused, see below.
    parameters, optimizer = updated(torch.float32, n=3, betas=(0.9, beta2))
    before = [optimizer.state[p]["exp_avg_sq"].clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = [optimizer.state[p]["exp_avg_sq"] for p in parameters]
    assert all((a < b).all() if shrinks else torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("key", ["beta1", "beta2"])
def test_a_beta_that_rounding_would_undo_is_refused(key):
    with pytest.raises(
        ValueError, match=rf"optim\.{key}=0\.999: must be at most 0\.99609375 where optim\.moments=bf16"
    ):
        replace(NARROW, **{key: 0.999})
    assert replace(ADAMW, **{key: 0.999}).moments is Moments.full


def test_under_muon_only_what_adamw_updates_is_narrow():
    state = Case("deepseek_v3", optim_config=replace(MUON, moments=Moments.bf16)).engine.state()["optimizer"]
    kinds = {(key, x.dtype) for moments in state.values() for key, x in moments.items()}
    narrow = {("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16)}
    assert kinds == narrow | {("step", torch.float32), ("momentum_buffer", torch.float64)}


def test_a_dry_run_knows_of_half_the_bytes():
    laptop = HardwareConfig("laptop", DeviceKind.cpu, 8.0, 1.0, 0.5, 0.5, 0.05, 8, 10.0, 1.0)
    config = compose("llama3_tiny", n_layers=1)
    run = {
        "model": config, "plan": ALONE, "precision": PrecisionConfig(Dtype.fp32, Dtype.fp32), "hardware": laptop,
        "world_size": 1, "train": replace(SHARED, global_batch=1, seq_len=32, loss_chunk=32),
    }  # fmt: skip
    full, narrow = (dryrun.run(**run, optim_config=each).memory for each in (ADAMW, NARROW))
    steps = 4 * sum(1 for _ in Case("llama3").model.parameters())
    n_tensors = full.optimizer - 2 * full.parameters
    assert 0 < n_tensors <= steps
    assert narrow.optimizer - n_tensors == full.parameters and narrow.parameters == full.parameters
    assert narrow.peak < full.peak


def from_the_same(plan):
    """Parameters after two updates in fp32 with the same weights and gradients everywhere."""
    torch.set_num_threads(1)
    case = Case("deepseek_v3", plan, precision=PrecisionConfig(Dtype.fp32, Dtype.fp32), optim_config=NARROW)
    named = dict(case.model.named_parameters())
    for update in range(2):
        for name, parameter in named.items():
            parameter.grad = torch.zeros_like(parameter)
            generator = torch.Generator().manual_seed(100 * update + len(name))
            for x in (parameter, parameter.grad)[update > 0 :]:
                view = reduce.view(case.model, name, x)
                whole = torch.randn(view.shape, generator=generator)
                part = reduce.part(view) if isinstance(view, torch.distributed.tensor.DTensor) else ...
                reduce.local(x).data.copy_(whole[part])
        case.engine.optimizer.step()
    return case.tensors()


@pytest.mark.parametrize("plan", ["fsdp 2", "tp 2", pytest.param("ep 2 x tp 2", marks=pytest.mark.slow)])
def test_the_same_gradients_give_bitwise_the_same_weights_and_moments(plan):
    config, ranks = PLANS[plan]
    want = from_the_same(ALONE)
    got = merged(run(from_the_same, world_size=ranks, plan=config))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def part_of_a_run(plan, folder, steps, name="deepseek_v3"):
    """Go on from a folder's latest checkpoint for some updates, save, and give the whole state."""
    torch.set_num_threads(1)
    case = Case(name, plan, optim_config=NARROW)
    checkpoints = (grouped if torch.distributed.is_initialized() else saved_alone)(folder)
    progress = checkpoints.restore(case.engine.state())
    case.engine.filled()
    first = 0 if progress is None else progress["step"]
    for step in range(first, first + steps):
        case.update(step)
    checkpoints.save(first + steps, case.engine.state(), progress={"step": first + steps})
    return case.tensors()


def test_a_restart_moves_no_bit(tmp_path):
    want = part_of_a_run(ALONE, tmp_path / "whole", steps=3)
    part_of_a_run(ALONE, tmp_path / "cut", steps=1)
    got = part_of_a_run(ALONE, tmp_path / "cut", steps=2)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_checkpoint_of_one_process_goes_on_under_any_plan(plan, tmp_path):
    config, ranks = PLANS[plan]
    want = part_of_a_run(ALONE, tmp_path / "alone", steps=3)
    part_of_a_run(ALONE, tmp_path / "moved", steps=1)
    results = run(part_of_a_run, world_size=ranks, plan=config, folder=tmp_path / "moved", steps=2)
    same(merged(results), want)


def test_moments_of_another_width_are_not_read(tmp_path):
    part_of_a_run(ALONE, tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=r"exp_avg.*bfloat16") as caught:
        saved_alone(tmp_path).restore(Case("deepseek_v3").engine.state())
    assert "\n" not in str(caught.value)
