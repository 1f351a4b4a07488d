"""Checkpoints: bitwise round trips between layouts, and which folders count, stay and go."""

import os
from pathlib import Path
from typing import Any

import pytest
from distributed import run
from saving import DTYPES, PROGRESS, alone, full, grouped, small_state, trained

from trainer.stored import read_tensors
from trainer.tree import fill, flatten


def save_trained(*, folder: Path, layout: str) -> dict[str, Any]:
    """Every leaf of the states saved, one checkpoint a dtype."""
    saved = {}
    for dtype in DTYPES:
        state = trained(layout, dtype=dtype, steps=2)
        grouped(folder / str(dtype)).save(2, state, progress=PROGRESS)
        saved[str(dtype)] = full(state)
    return saved


def load_trained(*, folder: Path, layouts: list[str]) -> list[tuple[dict[str, Any], list[Any]]]:
    """For every layout, every leaf of the states loaded over other values, and the progress."""
    results = []
    for layout in layouts:
        loaded, progress = {}, []
        for dtype in DTYPES:
            state = trained(layout, dtype=dtype, steps=0)
            progress.append(grouped(folder / str(dtype)).restore(state))
            loaded[str(dtype)] = full(state)
        results.append((loaded, progress))
    return results


@pytest.mark.parametrize(
    "writers, readers",
    [
        (("plain", 1), {1: ["plain"], 2: ["fsdp"]}),
        (("fsdp", 2), {1: ["plain", "fsdp"], 2: ["fsdp", "plain"], 4: ["fsdp", "hsdp"]}),
        (("fsdp", 4), {1: ["plain"], 2: ["fsdp"]}),
        (("hsdp", 4), {1: ["plain"], 2: ["fsdp"], 4: ["hsdp"]}),
    ],
    ids=["one", "two", "four", "two_by_two"],
)
def test_state_is_bitwise_equal_in_every_layout(tmp_path, writers, readers):
    layout, size = writers
    saved = run(save_trained, world_size=size, folder=tmp_path, layout=layout)
    assert all(state == saved[0] for state in saved)
    for size, layouts in readers.items():
        for rank in run(load_trained, world_size=size, folder=tmp_path, layouts=layouts):
            assert len(rank) == len(layouts)
            for loaded, progress in rank:
                assert loaded == saved[0]
                assert progress == [PROGRESS] * len(DTYPES)


def test_values_and_tuples_come_back_as_they_were(tmp_path):
    alone(tmp_path).save(1, small_state(), progress={"step": 1})
    state = small_state(0.0)
    state["optimizer"]["groups"][0]["betas"] = (0.0, 0.0)
    assert alone(tmp_path).restore(state) == {"step": 1}
    assert state["optimizer"]["groups"] == [{"betas": (0.9, 0.95)}]
    assert full(state) == full(small_state())


def test_flatten_and_fill_name_leaves_by_place():
    state = {"a": {"b": 1}, "c": [2, (3, {"d": None})]}
    assert flatten(state) == {"a.b": 1, "c.0": 2, "c.1.0": 3, "c.1.1.d": None}
    assert fill(state, values={"a.b": 5, "c.0": 6, "c.1.0": 7, "c.1.1.d": 8}) == {
        "a": {"b": 5},
        "c": [6, (7, {"d": 8})],
    }


def test_tensors_are_read_one_by_one_without_a_process_group(tmp_path):
    saved = run(save_trained, world_size=2, folder=tmp_path, layout="fsdp")[0]["torch.bfloat16"]
    tensors = read_tensors(tmp_path / "torch.bfloat16" / "step-00000002", under="model")
    assert set(tensors) == {"up.weight", "up.bias", "down.weight", "down.bias", "balance_bias"}
    assert full({"model": dict(tensors)}) == {name: saved[name] for name in saved if name.startswith("model.")}
    assert str(tensors.kinds["up.weight"]) == "[17, 12] bfloat16"


def test_only_the_newest_checkpoints_stay(tmp_path):
    checkpoints = alone(tmp_path, keep=2)
    for step in (1, 2, 3, 100_000_000):
        checkpoints.save(step, small_state(), progress={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-100000000"]
    assert checkpoints.latest() == tmp_path / "step-100000000"


def test_keep_0_keeps_all(tmp_path):
    for step in (1, 2, 3):
        alone(tmp_path, keep=0).save(step, small_state(), progress={})
    assert len(list(tmp_path.iterdir())) == 3


def test_leftovers_of_killed_runs_do_not_count_and_go(tmp_path):
    alone(tmp_path).save(1, small_state(), progress={})
    for name in (".step-00000002.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    assert alone(tmp_path).latest() == tmp_path / "step-00000001"
    alone(tmp_path).save(2, small_state(), progress={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_auto_skips_a_checkpoint_that_is_not_whole_and_says_so(tmp_path, caplog):
    for step in (1, 2):
        alone(tmp_path).save(step, small_state(), progress={"step": step})
    os.truncate(next((tmp_path / "step-00000002").glob("*.distcp")), 10)
    assert alone(tmp_path).restore(small_state()) == {"step": 1}
    assert "skipped" in caplog.text and "10 bytes" in caplog.text
    assert (tmp_path / "replaced-1" / "step-00000002").is_dir()


def test_starting_further_back_sets_later_checkpoints_aside(tmp_path):
    for step in (1, 2, 3):
        alone(tmp_path).save(step, small_state(float(step)), progress={"step": step})
    assert alone(tmp_path, resume=str(tmp_path / "step-00000002")).restore(small_state()) == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replaced-1", "step-00000001", "step-00000002"]
    assert alone(tmp_path, resume="never").restore(small_state()) is None
    assert alone(tmp_path).latest() is None
    assert sorted(path.name for path in (tmp_path / "replaced-2").iterdir()) == ["step-00000001", "step-00000002"]


def test_nothing_to_resume_is_none(tmp_path):
    assert alone(tmp_path / "absent").restore(small_state()) is None
    assert not (tmp_path / "absent").exists()
