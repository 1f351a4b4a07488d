"""What is wrong with a run is said in one line, by the whole path of its key."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from conf import schema

CONF = Path(schema.__file__).parent


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.blocks.moe.moe.router.n_groups=0", "model.blocks.moe.moe.router.n_groups=0: must be above 0"),
        ("model.blocks.moe.moe.router.n_groups=3", "router.n_groups=3: must be a divisor of n_experts (16)"),
        ("model.blocks.dense.mla.norm.eps=-1", "model.blocks.dense.mla.norm.eps=-1.0: must be above 0"),
        ("model.blocks.dense.mla.rope.scaling.factor=0", "model.blocks.dense.mla.rope.scaling.factor=0.0: must be"),
        ("model.blocks.dense.mlp=null", "model.blocks.dense=no feed-forward: must be mlp, moe or both"),
        ("model.prefix=[sparse]", "model.prefix=sparse: must be one of ['dense', 'moe']"),
        ("model.family=foo-bar", "model.family=foo-bar: must be a name of letters, digits and _"),
        ("data=shards", "data.folder=None: must be a folder of shards"),
        ("train.steps=0", "train.steps=0: must be above 0"),
        ("train.max_norm=nan", "train.max_norm=nan: must be above 0"),
        ("train.mtp_weight=inf", "train.mtp_weight=inf: must be 0 or more, and finite"),
        ("optim.eps=-1", "optim.eps=-1.0: must be above 0, and finite"),
        ("optim.eps=0", "optim.eps=0.0: must be above 0, and finite"),
        ("optim.lr=inf", "optim.lr=inf: must be above 0, and finite"),
        ("optim.weight_decay=nan", "optim.weight_decay=nan: must be 0 or more, and finite"),
        ("precision.params=bf16", "precision.params=bf16, precision.compute=fp32: must be fp64 with fp64, fp32 with"),
    ],
)
def test_a_check_of_a_part_names_the_whole_path(override, line):
    with pytest.raises(schema.ConfigError) as caught:
        resolved(override)
    said = str(caught.value)
    assert said.startswith("model." if override.startswith("model.") else line) and line in said
    assert "\n" not in said


def test_gradients_may_go_unclipped():
    assert resolved("train.max_norm=inf").train.max_norm == float("inf")


@pytest.mark.parametrize("word", ["model=null", "optim=", "+experiment=null"])
def test_a_group_without_a_choice_is_refused(word):
    with pytest.raises(schema.ConfigError, match=f"^{word.replace('+', '.')}: must be one of [a-z]"):
        schema.check_words(["train.steps=3", word])


def test_other_words_are_left_to_hydra():
    schema.check_words(["model=qwen3_tiny", "train.steps=3", "checkpoint.init=null", "nothing=null", "~data", "--help"])


def resolved(*overrides: str) -> schema.RunConfig:
    schema.register()
    with initialize_config_dir(str(CONF), version_base=None):
        return schema.resolve(compose("train", overrides=["run_dir=runs/x", *overrides]))
