"""Which parameters decay, and what the optimizer's groups are made of."""

from dataclasses import replace

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from models import CONF, compose
from sharing import ADAMW, FAMILIES, MUON, Case

from conf import schema
from trainer import groups, optim
from trainer.config import OptimKind
from trainer.config_groups import Role
from zoo.decoder import Decoder


def shapes(config):
    with torch.device("meta"):
        return {name: p.shape for name, p in Decoder(config).named_parameters()}


def decaying(name, no_decay, kind=OptimKind.adamw):
    """Of a family: roles with a parameter that decays, and roles with one that does not."""
    config, found = FAMILIES[name](), {True: set(), False: set()}
    for each, shape in shapes(config).items():
        group = groups.group(each, shape, config=config, kind=kind, no_decay=no_decay)
        found[group.decays].add(str(group.role))
    return found[True], found[False]


@pytest.mark.parametrize("kind", OptimKind)
def test_unless_said_otherwise_vectors_do_not_decay(kind):
    for name, family in FAMILIES.items():
        config = family()
        for each, shape in shapes(config).items():
            assert groups.group(each, shape, config=config, kind=kind).decays == (len(shape) > 1), (name, each)


def test_olmo_2_decays_all_but_the_embedding():
    assert decaying("olmo2", [Role.embedding]) == ({"head", "norm", "matrix"}, {"embedding"})
    assert decaying("glm45", [Role.embedding, Role.bias]) == ({"head", "norm", "matrix"}, {"embedding", "bias"})


def test_one_matrix_that_is_embedding_and_head_is_an_embedding():
    config = compose("smollm3_tiny")
    assert config.tied and not any(groups.role(name, config=config) is Role.head for name in shapes(config))
    assert not groups.group(
        "embed.weight", (9, 9), config=config, kind=OptimKind.adamw, no_decay=[Role.embedding]
    ).decays


@pytest.mark.parametrize("settings", [ADAMW, MUON])
@pytest.mark.parametrize("no_decay", [None, [], [Role.norm], [Role.matrix, Role.embedding]])
def test_the_optimizer_has_the_groups_that_the_table_lists(settings, no_decay):
    settings = replace(settings, no_decay=no_decay)
    case = Case("deepseek_v3", optim_config=settings)
    lines = groups.table(shapes(case.config), config=case.config, optim=settings)
    listed, there = {}, {}
    for line in lines:
        listed[line.weight_decay] = listed.get(line.weight_decay, 0) + line.numbers
    for group in case.engine.optimizer.param_groups:
        numbers = sum(p.numel() for p in group["params"])
        there[group["weight_decay"]] = there.get(group["weight_decay"], 0) + numbers
        assert group["lr"] == settings.lr
    assert {decay: n for decay, n in there.items() if n} == listed


def test_what_does_not_decay_only_moves_by_its_gradient():
    case = Case("olmo2", optim_config=replace(ADAMW, no_decay=[Role.embedding]))
    named = dict(case.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.zeros_like(p)
    case.engine.optimizer.step()
    for name, p in named.items():
        kept = 1.0 if name == "embed.weight" else 1 - ADAMW.lr * ADAMW.weight_decay
        torch.testing.assert_close(p.detach(), kept * before[name], rtol=1e-14, atol=0)


def test_the_table_says_lr_and_decay_of_each_group():
    text = optim.table(FAMILIES["olmo2"](), replace(ADAMW, no_decay=[Role.embedding]))
    rows = {line.split()[0]: line.split()[-2:] for line in text.splitlines()[1:]}
    roles = ("embedding", "head", "norm", "matrix")
    assert rows == {role: ["0.01", "0" if role == "embedding" else "0.1"] for role in roles}


def composed(*words):
    GlobalHydra.instance().clear()
    schema.register()
    with initialize_config_dir(str(CONF), version_base=None):
        return schema.resolve(hydra_compose("train", overrides=["model=llama3_tiny", "run_dir=x", *words]))


def test_roles_are_chosen_by_name_on_the_command_line():
    found = composed("optim.no_decay=[embedding,norm]", "optim.moments=bf16").optim
    assert found.no_decay == [Role.embedding, Role.norm]
    with pytest.raises(schema.USER_ERRORS) as caught:
        composed("optim.no_decay=[embeding]")
    said = schema.explain(caught.value)
    assert said.startswith("optim.no_decay") and "embedding" in said and "\n" not in said
