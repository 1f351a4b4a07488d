import pytest

from parallel.config import Dtype, ParallelConfig, PrecisionConfig, Sizes, accumulation, fit


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
