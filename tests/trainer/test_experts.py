"""Numbers and the picture of how busy experts are."""

import math

import numpy as np
import pytest
import torch

from trainer.experts import COLUMNS, REACH, HeatMap, by_layer, evenly, image, measures, summary

LOADS = torch.tensor([[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 8.0, 0.0], [6.0, 1.0, 1.0, 0.0]])


def test_loads_are_measured_layer_by_layer():
    of = measures(LOADS.double())
    assert of["expert_load_max"].tolist() == [2, 1, 4, 3]
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.125)) / math.log(4)
    assert of["expert_entropy"].tolist() == pytest.approx([0.5, 1.0, 0.0, mixed])
    assert of["dead_experts"].tolist() == [2, 0, 3, 1]


def test_the_summary_is_of_the_worst_layer_and_dead_experts_are_of_all():
    found = {key: value.item() for key, value in summary(LOADS.double()).items()}
    assert found == {"expert_load_max": 4, "expert_entropy": 0, "dead_experts": 6}


def test_values_of_a_layer_carry_its_name():
    found = by_layer(LOADS[:2].double(), ["blocks.3", "mtp.0"])
    assert {key: value.item() for key, value in found.items()} == {
        "expert_load_max/blocks.3": 2, "expert_load_max/mtp.0": 1, "expert_entropy/blocks.3": 0.5,
        "expert_entropy/mtp.0": 1, "dead_experts/blocks.3": 2, "dead_experts/mtp.0": 0,
    }  # fmt: skip


def test_a_single_expert_is_evenly_busy():
    assert {key: value.item() for key, value in summary(torch.tensor([[7.0]])).items()} == {
        "expert_load_max": 1, "expert_entropy": 1, "dead_experts": 0,
    }  # fmt: skip


def test_experts_that_share_a_row_of_pixels_show_the_one_furthest_from_the_mean():
    loads = np.array([[1.0, 2, 0, 1], [0.5, 1.5, 1, 1]])[:, :, None]
    assert [rows.tolist() if isinstance(rows, np.ndarray) else rows for rows in image(loads, rows=4)] == [
        [[1.0], [-REACH - 1], [-1.0], [0.0]], 2,
    ]  # fmt: skip
    picture, height = image(loads, rows=100)
    assert height == 4 and picture[:, 0] == pytest.approx([0, 1, -4, 0, -1, math.log2(1.5), 0, 0])


def test_columns_are_evenly_spread_whatever_records_there_are():
    assert evenly(np.array([10.0, 20, 30, 70])).tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert evenly(np.array([5.0])).tolist() == [0]
    assert len(evenly(np.array([1.0, 2, 10**6]))) == 2 * COLUMNS


def test_a_long_run_keeps_as_many_records_as_a_picture_shows(tmp_path):
    heat = HeatMap(tmp_path / "experts.png", title="run")
    for step in range(1, 4 * COLUMNS + 2):
        heat.add(step, {"blocks.1": [step % 2 * 2, 2]})
    steps = [step for step, _ in heat._records]
    assert COLUMNS <= len(steps) < 2 * COLUMNS and steps == sorted(steps)
    assert heat._records[0][1].tolist() == [[0.5, 1.5]]  # 2 of 4, 0 of 2: in means 1 1 and 0 2


@pytest.mark.parametrize("layers, experts, updates", [(3, 16, 1), (2, 4, 30), (58, 256, 3)])
def test_the_picture_is_written_whole(tmp_path, layers, experts, updates):
    heat = HeatMap(tmp_path / "plots" / "experts.png", title="run")
    assert not heat.draw() and not (tmp_path / "plots").exists()
    generator = np.random.default_rng(0)
    for step in range(updates):
        loads = generator.integers(0, 9, (layers, experts)).tolist()
        heat.add(10 * step, {f"blocks.{i}": row for i, row in enumerate(loads)})
    assert heat.draw()
    assert (tmp_path / "plots" / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["experts.png"]
