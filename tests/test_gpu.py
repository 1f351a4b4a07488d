"""Runs on a CUDA device, against the same runs on a CPU, and kernels there against float64 here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import SHIPPED

from zoo.config_mixer import TemperatureConfig, TemperatureKind
from zoo.kernel import Kernel
from zoo.kernel_choice import KernelName, able
from zoo.mask import Mask

ROOT = Path(__file__).parents[1]
SMALL = [
    "data=synthetic", "log.wandb=disabled", "train.steps=4", "train.seq_len=64", "train.global_batch=8",
    "train.micro_batch=4", "train.eval_every=4", "train.eval_rows=5",
]  # fmt: skip


def losses(run_dir, *overrides, visible):
    environment = os.environ if visible else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", *SMALL, f"run_dir={run_dir}", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows] + [rows[-1]["val_loss"]]


@pytest.mark.gpu
@pytest.mark.parametrize("model", [name for name in SHIPPED if name.endswith("_tiny")])
@pytest.mark.parametrize("precision, error", [("fp64", 1e-8), ("fp32", 1e-3), ("bf16", 2e-2)])
def test_losses_on_a_gpu_are_those_on_a_cpu(tmp_path, model, precision, error):
    run = [f"model={model}", f"precision={precision}"]
    on_gpu = losses(tmp_path / "gpu", *run, visible=True)
    assert on_gpu == pytest.approx(losses(tmp_path / "cpu", *run, visible=False), rel=error)


SLOTS = {
    "bare": {},
    "softcap": {"softcap": 5.0},
    "temperature": {"temperature": TemperatureConfig(kind=TemperatureKind.ratio, floor=16)},
    "sinks": {"has_sinks": True},
    "wide keys": {"width": 96, "v_width": 64},
}


def made(slots):
    return Kernel(**{"scale": 0.1, "width": 64, "v_width": 64} | SLOTS[slots])


KERNELS = [
    (name, slots, dtype, error)
    for name in KernelName
    for slots in SLOTS
    for dtype, error in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2))
    if name is not KernelName.plain and name in able(made(slots).needs, device=torch.device("cuda"), dtype=dtype)
]


@pytest.mark.gpu
@pytest.mark.parametrize("reach", [{}, {"window": 50}, {"chunk": 64}], ids=str)
@pytest.mark.parametrize("name, slots, dtype, error", KERNELS)
def test_a_kernel_on_a_gpu_gives_what_plain_gives_in_float64(name, slots, dtype, error, reach):
    kernel = made(slots)
    lengths, generator = [1, 130, 7, 62], torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, -1)
    widths = [(4, kernel.needs.width), (2, kernel.needs.width), (2, kernel.needs.v_width)]
    inputs = [torch.randn(2, 200, heads, width, generator=generator) for heads, width in widths]
    inputs += [torch.randn(4, generator=generator)] * kernel.needs.sinks
    inputs = [each.to(dtype) for each in inputs]  # rounded for both

    def attend(chosen, device, dtype):
        kernel.chosen = chosen
        mask = Mask(documents.to(device), positions.to(device), **reach)
        given = [each.to(device, dtype).requires_grad_() for each in inputs]
        y = kernel(*given[:3], mask, sinks=given[3] if kernel.needs.sinks else None)
        pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *torch.autograd.grad(y, given, pull)]

    got, want = attend(name, "cuda", dtype), attend(KernelName.plain, "cpu", torch.float64)
    for one, other in zip(got, want, strict=True):
        far = (one.detach().cpu().double() - other.detach()).abs().max() / other.detach().abs().max()
        assert far < error
