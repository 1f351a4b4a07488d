"""Looks at updates under every kind of plan: numbers, reports and skips are those of one process."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import run
from sharing import ALONE, SETTINGS, merged, same
from watching import RULE, Watched, alone, log_config, watched

from parallel.config import ParallelConfig

PLANS = {
    "fsdp 2": ParallelConfig(1, 2),
    "pp 2": ParallelConfig(1, 1, pp=2),
    "tp 2": ParallelConfig(1, 1, tp=2),
    "cp 2": ParallelConfig(1, 1, cp=2),
    "ep 2": ParallelConfig(1, 2, ep=2),
    "hsdp 2 x 1": ParallelConfig(2, 1),
}
SPOILT = {"name": "deepseek_v3", "updates": 10, "parameter": "blocks.1.mixer.wo.weight", "at": 8}


@functools.cache
def one_process():
    with tempfile.TemporaryDirectory() as folder:
        return alone(folder=Path(folder), **SPOILT)


def test_a_spoilt_update_is_named_and_skipped_and_nothing_else_is():
    lines, said, reports, state, _ = one_process()
    assert [line["skipped"] for line in lines] == [0.0] * 7 + [1.0, 0.0, 0.0]
    (report,), (told,) = reports, said
    assert report["layers"][0]["name"] == "blocks.1"
    assert report["parameters"][0]["name"] == "blocks.1.mixer.wo.weight"
    assert told.startswith("step 8 was skipped: gradient norm") and "most grown: blocks.1.mixer.wo.weight (" in told
    assert (state.step, state.skipped, len(state.history.losses)) == (10, 1, 10)


def test_details_are_there_when_they_are_due():
    lines, *_ = one_process()
    keys = {key.split("/")[0] for line in lines for key in line if "/" in key}
    assert keys == {"mtp_loss", "grad_norm", "update_rms", "activation_rms", "max_attention_logit"}
    for line in lines:
        detail = {key for key in line if "/" in key and not key.startswith("mtp_loss/")}
        assert bool(detail) == (line["step"] % 2 == 0)
        assert line["mtp_loss"] == pytest.approx((line["mtp_loss/1"] + line["mtp_loss/2"]) / 2, rel=1e-12)
        assert line["z_loss"] > 0
    last = lines[-1]
    layers = {f"blocks.{i}" for i in range(3)} | {"mtp.0", "mtp.1"}
    assert {key.partition("/")[2] for key in last if key.startswith("activation_rms/")} == layers
    assert {"matrix", "embedding", "head", "norm", *layers} <= {
        key.partition("/")[2] for key in last if key.startswith("update_rms/")
    }
    skipped = {key: value for key, value in lines[7].items() if key.startswith("update_rms/")}
    assert skipped and not any(skipped.values())


SLOW = [pytest.param(plan, marks=pytest.mark.slow) for plan in PLANS if plan not in ("fsdp 2", "pp 2")]


@pytest.mark.parametrize("plan", ["fsdp 2", "pp 2", *SLOW])
def test_a_plan_sees_what_one_process_sees(plan, tmp_path):
    want, said, reports, _, tensors = one_process()
    results = run(watched, world_size=2, timeout=900, plan=PLANS[plan], folder=tmp_path, **SPOILT)
    for lines, told, theirs, state, _ in results:
        assert lines == results[0][0] and state == results[0][3] and told == results[0][1]
        for got, exact in zip(lines, want, strict=True):
            assert got == pytest.approx(exact, rel=1e-9, abs=1e-15)
        assert len(told) == len(said) == 1 and told[0].partition(";")[0] == said[0].partition(";")[0]
        for one, other in zip(theirs, reports, strict=True):
            assert [line["name"] for line in one["layers"]] == [line["name"] for line in other["layers"]]
            assert one["parameters"][0]["name"] == other["parameters"][0]["name"]
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)
    same(merged(each for *_, each in results), tensors)


@pytest.mark.parametrize(
    "name, parameter",
    [
        ("llama3", "blocks.1.mixer.wq.weight"),
        ("llama3", "blocks.1.mixer_norm.weight"),
        ("deepseek_v3", "blocks.1.ff_norm.weight"),
    ],
)
def test_a_weight_that_is_thirty_times_too_large_is_named_by_its_layer(name, parameter, tmp_path):
    train = replace(SETTINGS, steps=100, outliers=RULE)
    run = Watched(name, ALONE, tmp_path, log=log_config(spikes=True), train=train)
    for step in range(1, 9):
        if step == 8:
            dict(run.case.model.named_parameters())[parameter].data.mul_(30)
        run.update()
    (told,) = run.said
    assert told.startswith("step 8 stands out") and "most grown: blocks.1." in told
