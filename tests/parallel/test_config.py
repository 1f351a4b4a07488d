import pytest

from parallel.config import Dispatch, Dtype, ParallelConfig, PipelineConfig, PrecisionConfig
from parallel.config_fit import Sizes, accumulation, check_pipeline, check_tensor, fit


def test_what_is_left_of_the_processes_shares_a_copy():
    assert fit(ParallelConfig(dp_replicate=2, dp_shard=None), world_size=8) == Sizes(2, 4)
    assert fit(ParallelConfig(dp_replicate=1, dp_shard=1), world_size=1) == Sizes(1, 1)


@pytest.mark.parametrize(
    "replicate, shard, world_size, message",
    [
        (1, 1, 2, r"parallel.dp_replicate=1, parallel.dp_shard=1: their product must be the number of processes \(2\)"),
        (3, None, 4, r"parallel.dp_replicate=3: must divide the number of processes \(4\)"),
        (0, None, 4, r"parallel.dp_replicate=0: must be 1 or more"),
        (1, -1, 4, r"parallel.dp_shard=-1: must be 1 or more"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_its_keys(replicate, shard, world_size, message):
    with pytest.raises(ValueError, match=message):
        fit(ParallelConfig(dp_replicate=replicate, dp_shard=shard), world_size=world_size)


def test_offloading_needs_what_is_sharded():
    plan = ParallelConfig(dp_replicate=1, dp_shard=None, offload=True)
    assert fit(plan, world_size=2) == Sizes(1, 2)
    with pytest.raises(ValueError, match=r"^parallel.offload=true: must be false in a single process"):
        fit(plan, world_size=1)


@pytest.mark.parametrize(
    "axis, choice, message",
    [
        ("tp", {"async_tp": True}, "parallel.async_tp=true: must be false where parallel.tp=1"),
        ("ep", {"dispatch": Dispatch.deepep}, "parallel.dispatch=deepep: must be all_to_all where parallel.ep=1"),
    ],
)
def test_what_speeds_up_an_axis_needs_several_ranks_of_it(axis, choice, message):
    assert getattr(fit(ParallelConfig(1, None, **{axis: 2}, **choice), world_size=2), axis) == 2
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit(ParallelConfig(1, None, **choice), world_size=2)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("key, value", [("microbatches", 0), ("microbatches", -2), ("virtual", 0)])
def test_a_pipeline_counts_from_one(pp, key, value):
    plan = ParallelConfig(1, None, pp=pp, pipeline=PipelineConfig(**{key: value}))
    with pytest.raises(ValueError, match=f"^parallel.pipeline.{key}={value}: must be 1 or more$"):
        check_pipeline(plan, n_layers=4, accumulation=4)


def test_a_batch_that_cannot_be_cut_is_refused_with_the_numbers():
    assert accumulation(global_batch=24, micro_batch=2, dp=4) == 3
    with pytest.raises(ValueError, match=r"train.global_batch=20: must be a multiple of train.micro_batch \(2\) times"):
        accumulation(global_batch=20, micro_batch=2, dp=4)


@pytest.mark.parametrize("compute", Dtype)
@pytest.mark.parametrize("params", Dtype)
def test_formats_that_do_not_go_together_are_refused_by_their_keys(params, compute):
    if (params, compute) in [("fp64", "fp64"), ("fp32", "fp32"), ("fp32", "bf16")]:
        assert PrecisionConfig(params, compute).compute is compute
        return
    with pytest.raises(ValueError) as caught:
        PrecisionConfig(params, compute)
    said = str(caught.value)
    assert said.startswith(f"precision.params={params}, precision.compute={compute}: must be fp64 with fp64, fp32 with")
    assert "bf16 rounds counts above 256" in said and "\n" not in said


def test_what_is_left_of_ranks_that_share_layers_shares_a_copy():
    assert fit(ParallelConfig(dp_replicate=2, dp_shard=None, tp=4), world_size=16) == Sizes(2, 2, 4)
    assert Sizes(2, 2, 4).dp == 4 and Sizes(2, 2, 4).ranks == 16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, None),
        ({"shared": {"model.blocks.dense.mlp.d_ff": 6}}, "parallel.tp=4: must divide model.blocks.dense.mlp.d_ff (6)"),
        ({"kv_heads": {"heads": 6}}, "parallel.tp=4: must divide heads (6) or be a multiple of it"),
        ({"vocab_size": 6}, "parallel.tp=4: must leave each rank a row of model.vocab_size (6)"),
    ],
)
def test_what_ranks_cannot_share_is_refused_by_its_key(changes, message):
    fits = {"shared": {"a": 8, "b": 0}, "kv_heads": {"one": 1, "two": 2, "more": 8}, "vocab_size": 7}
    if message is None:
        check_tensor(4, **fits)
        return
    with pytest.raises(ValueError) as caught:
        check_tensor(4, **fits | changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "config, world_size, message",
    [
        (
            ParallelConfig(2, None, tp=2), 6,
            "parallel.dp_replicate=2, parallel.tp=2: their product must divide the number of processes (6)",
        ),
        (
            ParallelConfig(1, 1, tp=2), 4,
            "parallel.dp_replicate=1, parallel.dp_shard=1, parallel.tp=2: their product must be the number of "
            "processes (4)",
        ),
        (
            ParallelConfig(1, 1, tp=2, offload=True), 2,
            "parallel.offload=true: must be false where parallel.tp=2 takes all processes",
        ),
    ],
)  # fmt: skip
def test_ranks_that_share_layers_are_counted_too(config, world_size, message):
    with pytest.raises(ValueError) as caught:
        fit(config, world_size=world_size)
    assert str(caught.value) == message
