"""Files of architectures are read as Hydra reads them, and their comments say what the cards need."""

from pathlib import Path

import pytest
import yaml
from models import PUBLISHED, SHIPPED, compose

from zoo import catalogue
from zoo.catalogue import load, published, read_comment, stand_in_note, text, tiny_of
from zoo.count import parameters

STAND_INS = catalogue.stand_ins()
TABLE = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))


@pytest.mark.parametrize("name", [*SHIPPED, *STAND_INS])
def test_a_file_is_the_config_that_hydra_makes_of_it(name):
    assert load(name) == compose(name)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_is_the_architecture_that_it_inherits(name):
    assert load(name) == load(catalogue.parent(name))
    assert name not in catalogue.sizes()


@pytest.mark.parametrize("name", [*PUBLISHED, *STAND_INS, *catalogue.without_dimensions()])
def test_a_comment_names_the_model_what_is_unusual_and_the_source(name):
    said = text(name)
    assert 3 < len(said.name) < 60 and said.unusual and len(said.source) > 10, said
    assert not [each for each in (said.name, *said.unusual, said.source, *said.remarks) if each != each.strip()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_of_a_model_is_left_out_is_no_part_of_what_is_unusual(name):
    said = text(name)
    assert "vision tower" not in " ".join([said.name, *said.unusual, said.source])


def test_a_comment_is_taken_apart():
    said = read_comment(
        "A 3.5 7B, text only: plain; so is 1.2. And tied. Sun et al. 2019; arXiv 1, table 2.1. Big. Old."
    )
    assert said.name == "A 3.5 7B, text only"
    assert said.unusual == ["Plain; so is 1.2", "And tied"]
    assert said.source == "Sun et al. 2019; arXiv 1, table 2.1"
    assert said.remarks == ["Big", "Old"]
    bare = read_comment("A 7B. Ours.")
    assert (bare.name, bare.unusual, bare.source, bare.remarks) == ("A 7B", ["Ours"], "", [])


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_the_published_ones_and_explained_where_the_count_differs(name):
    figures, survey = published(name), TABLE[name]["published"]
    total, active = survey.get("total"), survey.get("active")
    assert figures.total == (None if total is None else pytest.approx(total / 1e9, rel=1e-12))
    assert figures.active == (None if active in (None, total) else pytest.approx(active / 1e9, rel=1e-12))
    assert figures.note or not survey.get("tolerance_note")
    if not figures.note:
        counted = parameters(compose(name))
        assert counted.total == pytest.approx(total, rel=0.01) and counted.active == pytest.approx(active, rel=0.01)


def test_figures_are_of_shipped_models():
    assert set(catalogue._cards().published) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_size_has_one_for_a_cpu(name):
    tiny = tiny_of(name)
    assert tiny is not None and compose(tiny).family == compose(name).family


def test_a_stand_in_is_announced_and_nothing_else():
    note = "model=gpt4o_standin: the architecture of GPT-4o is unpublished, this is Chameleon 7B"
    assert stand_in_note("gpt4o_standin") == note
    assert stand_in_note("chameleon_7b") is None
