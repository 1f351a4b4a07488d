import math

import torch

from zoo.config_mixer import TemperatureConfig, TemperatureKind
from zoo.temperature import sharpening


def test_steps_grow_with_the_logarithm_of_whole_floors():
    config = TemperatureConfig(kind=TemperatureKind.steps, floor=4, scale=0.1)
    got = sharpening(config, torch.tensor([[0, 2, 3, 6, 7]]), dtype=torch.float64)
    want = [1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3)]
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64))


def test_the_ratio_of_logarithms_acts_beyond_the_floor_and_is_exactly_one_before():
    config = TemperatureConfig(kind=TemperatureKind.ratio, floor=1024)
    got = sharpening(config, torch.tensor([[0, 1, 1023, 1024, 2048, 1 << 20]]), dtype=torch.float32)
    assert got[0, :4].tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(got[0, 4:], torch.tensor([1.1, 2.0]))  # log2 2048 / log2 1024, log2 2**20 / log2 1024
