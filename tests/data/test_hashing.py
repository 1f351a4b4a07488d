"""Hashes that never change."""

import numpy as np

from data.hashing import combine, splitmix


def test_splitmix_gives_the_published_sequence():
    golden = 0x9E3779B97F4A7C15
    states = np.array([(golden * step) % 2**64 for step in range(3)], dtype=np.uint64)
    # the first outputs of SplitMix64 seeded with 0, as java.util.SplittableRandom and others give them
    assert splitmix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_order_of_parts_matters_and_any_integer_is_a_part():
    assert combine(1, 2) != combine(2, 1)
    assert combine(-1) == combine(2**64 - 1)


def test_arrays_are_hashed_element_by_element():
    together = combine(7, np.arange(5))
    assert together.tolist() == [combine(7, number)[0] for number in range(5)]
