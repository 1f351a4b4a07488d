"""The loss curve's picture and the arithmetic behind it."""

import math

import numpy as np
import pytest
from PIL import Image

from trainer.config import CurveAxis
from trainer.curve import TRAIN, VALIDATION, Curve, smooth, thin


def has_colour(path, colour):
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((abs(pixels.astype(int) - wanted).max(axis=1) < 4).any())


@pytest.mark.parametrize("axis", list(CurveAxis))
def test_the_picture_shows_training_and_validation(tmp_path, axis):
    curve = Curve(tmp_path / "plots" / "loss.png", title="run", axis=axis, entropy=5.0)
    curve.draw()
    assert not curve.path.exists()
    for step in range(1, 41):
        row = {"step": float(step), "loss": 4 + 4 / step}
        curve.add(row if step % 10 else row | {"val_loss": 4.5})
    curve.draw()
    with Image.open(curve.path) as picture:
        assert picture.size == (1280, 768)
    assert has_colour(curve.path, TRAIN)
    assert has_colour(curve.path, VALIDATION)
    assert [path.name for path in curve.path.parent.iterdir()] == ["loss.png"]


def test_one_update_and_numbers_that_are_none_can_be_drawn(tmp_path):
    curve = Curve(tmp_path / "loss.png", title="run", axis=CurveAxis.linear, entropy=None)
    curve.add({"step": 1.0, "loss": math.nan})
    curve.draw()
    curve.add({"step": 2.0, "loss": 3.0})
    curve.draw()
    assert curve.path.exists()


def test_a_disk_that_refuses_is_named_and_no_half_picture_stays(tmp_path, monkeypatch):
    def refuse(partial, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.record.os.replace", refuse)
    curve = Curve(tmp_path / "plots" / "loss.png", title="run", axis=CurveAxis.linear, entropy=None)
    curve.add({"step": 1.0, "loss": 3.0})
    with pytest.raises(OSError) as refused:
        curve.draw()
    assert str(refused.value) == f"cannot write {curve.path}: No space left on device"
    assert list(curve.path.parent.iterdir()) == []


def test_smooth_averages_the_neighbours_that_are_there():
    assert smooth(np.array([1.0, 2, 3, 4, 5]), window=3).tolist() == [1.5, 2, 3, 4, 4.5]
    assert smooth(np.array([1.0, math.inf, 3]), window=3).tolist() == [1, 2, 3]


def test_thin_keeps_both_ends():
    assert thin(101, points=3, axis=CurveAxis.linear).tolist() == [0, 50, 100]
    assert thin(101, points=3, axis=CurveAxis.log).tolist() == [0, 9, 100]
    assert thin(3, points=5, axis=CurveAxis.log).tolist() == [0, 1, 2]
