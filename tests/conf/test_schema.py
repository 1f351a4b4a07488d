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


@pytest.mark.parametrize(
    "overrides, processes, line",
    [
        (["parallel.tp=3"], 3, "parallel.tp=3: must divide train.seq_len (256)"),
        (["parallel.tp=3", "train.seq_len=240"], 3, "parallel.tp=3: must divide model.blocks.dense.mla.n_heads (4)"),
        (["train.seq_len=25"], 2, "parallel.tp=2: must divide train.seq_len (25)"),
        (["model.blocks.dense.mlp.d_ff=5"], 2, "parallel.tp=2: must divide model.blocks.dense.mlp.d_ff (5)"),
        (["model.blocks.moe.moe.d_expert=63"], 2, "parallel.tp=2: must divide model.blocks.moe.moe.d_expert (63)"),
        (["model.blocks.moe.moe.d_shared=63"], 2, "parallel.tp=2: must divide model.blocks.moe.moe.d_shared (63)"),
        (["model.vocab_size=1"], 2, "parallel.tp=2: must leave each rank a row of model.vocab_size (1)"),
        (["parallel.tp=0"], 2, "parallel.tp=0: must be 1 or more"),
        (
            [
                "model=llama3_tiny",
                "model.blocks.dense.attention.n_heads=9",
                "model.blocks.dense.attention.n_kv_heads=3",
            ],
            2,
            "parallel.tp=2: must divide model.blocks.dense.attention.n_heads (9)",
        ),
        (
            [
                "model=llama3_tiny",
                "model.blocks.dense.attention.n_heads=12",
                "model.blocks.dense.attention.n_kv_heads=6",
            ]
            + ["parallel.tp=4"],
            4,
            "parallel.tp=4: must divide model.blocks.dense.attention.n_kv_heads (6) or be a multiple of it",
        ),
        (
            ["model=qwen3_next_tiny", "model.blocks.delta.deltanet.n_k_heads=1"],
            2,
            "parallel.tp=2: must divide model.blocks.delta.deltanet.n_k_heads (1)",
        ),
        (
            ["model=olmo2_tiny", "model.blocks.dense.attention.qk_norm.kind=layer"]
            + ["model.blocks.dense.attention.qk_norm.late_cast=false"],
            2,
            "model.blocks.dense.attention.qk_norm.kind=layer: must be rms where scope is width and parallel.tp=2",
        ),
        (["parallel.tp=2"], 3, "parallel.dp_replicate=1, parallel.tp=2: their product must divide the number of"),
    ],
)
def test_what_ranks_cannot_share_is_said_by_its_key(overrides, processes, line):
    with pytest.raises(schema.ConfigError) as caught:
        schema.check(resolved("parallel=tp_fsdp", *overrides), world_size=processes)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["world_size=8"], "world_size=8: must be null"),
        (["dry_run=true", "world_size=0"], "world_size=0: must be 1 or more"),
        (["dry_run=true", "world_size=-4"], "world_size=-4: must be 1 or more"),
        (["rank=1"], "rank=1: must be 0 unless dry_run=true"),
        (["dry_run=true", "rank=2"], "rank=2: must be one of the 2 processes, from 0"),
        (["dry_run=true", "rank=-1"], "rank=-1: must be one of the 2 processes, from 0"),
    ],
)
def test_whose_share_a_dry_run_takes_is_said_in_a_dry_run(overrides, line):
    with pytest.raises(schema.ConfigError, match=f"^{line}"):
        schema.check(resolved(*overrides), world_size=2)


def test_kinds_of_layer_that_no_layer_is_of_need_not_divide():
    unused = ["model.prefix=[]", "model.blocks.dense.mlp.d_ff=5"]
    assert schema.check(resolved("parallel=tp_fsdp", *unused), world_size=4).tp == 2


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
