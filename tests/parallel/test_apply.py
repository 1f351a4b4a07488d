"""The choice of kernels when a model is built, and the line that tells it."""

import pytest
import torch
from models import compose

from parallel.apply import build, describe
from parallel.config import Dtype, KernelChoice, ParallelConfig, PrecisionConfig, Remat, Reshard
from parallel.config_fit import Sizes
from parallel.kernels import choose_kernels
from parallel.mesh import Mesh, MeshError, open_mesh
from zoo.decoder import Decoder
from zoo.kernel import Kernel
from zoo.kernel_choice import KernelName

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRECISION = PrecisionConfig(Dtype.fp32, Dtype.fp32)


def alone():
    return open_mesh(Sizes(1, 1), rank=0, local_rank=0)


def on_meta(name):
    with torch.device("meta"):
        return Decoder(compose(name))


def line(model, mesh=None, **plan):
    plan = ParallelConfig(**plan)
    return describe(model, mesh=mesh or alone(), precision=PRECISION, plan=plan, choice="llama3_tiny")


def chosen(model):
    return [module.chosen for module in model.modules() if isinstance(module, Kernel)]


def test_every_word_of_the_plan_but_auto_is_a_kernel():
    assert {choice.value for choice in KernelChoice} == {"auto", *(name.value for name in KernelName)}


def test_auto_takes_the_best_kernel_of_each_layer():
    model = on_meta("gpt_oss_tiny")
    choose_kernels(model, KernelChoice.auto, device=CPU, dtype=torch.float32)
    assert set(chosen(model)) == {KernelName.plain}
    choose_kernels(model, KernelChoice.auto, device=CUDA, dtype=torch.bfloat16)
    assert set(chosen(model)) == {KernelName.flex}


def test_a_wanted_kernel_is_taken_where_it_can():
    model = build(
        compose("llama3_tiny"), mesh=alone(), precision=PRECISION, plan=ParallelConfig(kernel=KernelChoice.plain)
    )
    assert set(chosen(model)) == {KernelName.plain}
    assert "; attention: plain" in line(model)


@pytest.mark.parametrize(
    "name, wanted, device, dtype, message",
    [
        (
            "grok2_tiny", "sdpa", CUDA, torch.bfloat16,
            "parallel.kernel=sdpa: cannot do softcap, temperature (blocks.0.mixer): must be auto, plain or flex",
        ),
        (
            "gpt_oss_tiny", "varlen", CPU, torch.float32,
            "parallel.kernel=varlen: cannot do sinks, a CPU, float32 (blocks.0.mixer): must be auto or plain",
        ),
        (
            "deepseek_v3_tiny", "flex", CPU, torch.float64,
            "parallel.kernel=flex: cannot do a backward on a CPU, float64 (blocks.0.mixer): must be auto, plain or "
            "sdpa",
        ),
    ],
)  # fmt: skip
def test_a_kernel_that_cannot_is_refused_with_the_layers_need(name, wanted, device, dtype, message):
    with pytest.raises(MeshError) as caught:
        choose_kernels(on_meta(name), KernelChoice(wanted), device=device, dtype=dtype)
    assert str(caught.value) == message


def test_auto_refuses_a_layer_that_only_the_slow_kernel_can_do_on_a_gpu():
    with pytest.raises(MeshError) as caught:
        model = on_meta("grok2_tiny")
        for module in model.modules():
            if isinstance(module, Kernel):
                module.needs = type(module.needs)(8, 8, softcap=True)
        choose_kernels(model, KernelChoice.auto, device=CUDA, dtype=torch.bfloat16)
    assert str(caught.value) == "parallel.kernel=auto: no fast kernel does this (blocks.0.mixer): must be plain"


def test_the_line_of_the_run_counts_layers_where_kernels_differ():
    model = build(compose("llama3_tiny"), mesh=alone(), precision=PRECISION)
    assert "; attention: sdpa" in line(model)
    next(module for module in model.modules() if isinstance(module, Kernel)).chosen = KernelName.plain
    assert "; attention: sdpa in 3 layers, plain in 1 layer" in line(model)


def test_the_line_of_the_run_says_what_the_plan_does():
    model, two = on_meta("llama3_tiny"), Mesh(Sizes(1, 2), CPU, None, 0)
    assert line(model).endswith("; attention: sdpa")
    assert line(model, two).endswith("; attention: sdpa; ZeRO-3")
    changed = line(model, two, reshard=Reshard.never, offload=True, remat=Remat.selective, compile=True)
    assert changed.endswith(
        "; ZeRO-2; parameters and optimizer state in the memory of the host; recompute: selective; blocks compiled"
    )
