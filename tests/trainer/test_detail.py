"""Details of an update against what they mean, computed by hand in one process."""

from dataclasses import replace

import pytest
import torch
from sharing import ALONE, SETTINGS, rows
from watching import Watched, log_config

from trainer.groups import role
from zoo.context import Context


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A line with details; gradients, values before and after."""
    seen = {}

    def spoil(step, model):
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    folder = tmp_path_factory.mktemp("detail")
    train = replace(SETTINGS, steps=10)
    run = Watched("qwen3_moe", ALONE, folder, log=log_config(detail=True), train=train, spoil=spoil)
    before = {name: p.detach().clone() for name, p in run.case.model.named_parameters()}
    activations = outputs(run.case.model, rows(0, run.case.config.n_mtp))
    line = run.update()
    after = {name: p.detach().clone() for name, p in run.case.model.named_parameters()}
    return line, run.case.config, seen, before, after, activations


@torch.no_grad()
def outputs(model, batch):
    """What every block gives for a whole global batch."""
    context = Context(batch.positions, batch.documents, torch.float64, model.config.context)
    x, found = model.embed(batch.tokens), {}
    for i, block in enumerate(model.layers()):
        x, _ = block(x, context)
        found[f"blocks.{i}"] = x
    return found


def test_norms_and_changes_are_those_of_groups_and_layers(measured):
    line, config, gradients, before, after, _ = measured
    for key in ("matrix", "embedding", "head", "norm", "blocks.0", "blocks.2"):
        mine = [name for name in gradients if key in (role(name, config=config), ".".join(name.split(".")[:2]))]
        squares = sum(gradients[name].square().sum() for name in mine)
        assert line[f"grad_norm/{key}"] == pytest.approx(squares.sqrt().item(), rel=1e-12)
        changes = torch.cat([(after[name] - before[name]).flatten() for name in mine])
        assert line[f"update_rms/{key}"] == pytest.approx(rms(changes), rel=1e-9)
    parts = [line[f"grad_norm/{key}"] for key in ("matrix", "embedding", "head", "norm")]
    assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-12)


def test_every_layer_that_attends_tells_its_largest_logit(measured):
    line, config, *_ = measured
    layers = [line[f"max_attention_logit/blocks.{i}"] for i in range(config.n_layers)]
    assert line["max_attention_logit"] == max(layers) and "clipped_heads" not in line


def test_activations_are_what_blocks_give(measured):
    line, *_, activations = measured
    for name, x in activations.items():
        assert line[f"activation_rms/{name}"] == pytest.approx(rms(x), rel=1e-12)
