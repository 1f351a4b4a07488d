"""The order of windows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.hashing import combine
from data.permutation import permute


def order(size, *, seed):
    numbers = np.arange(size, dtype=np.uint64)
    return permute(numbers, size=size, key=combine(seed, np.zeros(size, dtype=np.uint64)))


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_every_place_is_taken_once(size, seed):
    assert sorted(order(size, seed=seed).tolist()) == list(range(size))


def test_one_number_alone_goes_where_it_goes_among_all():
    whole = order(1000, seed=3)
    for number in (0, 1, 500, 999):
        alone = permute(np.array([number], dtype=np.uint64), size=1000, key=combine(3, np.zeros(1, dtype=np.uint64)))
        assert alone[0] == whole[number]


def test_numbers_of_several_keys_are_permuted_each_by_its_own():
    keys = combine(0, np.array([1, 2, 1, 2]))
    mixed = permute(np.array([5, 5, 9, 9], dtype=np.uint64), size=100, key=keys)
    for place in range(4):
        single = permute(np.array([[5, 5, 9, 9][place]], dtype=np.uint64), size=100, key=keys[place : place + 1])
        assert single[0] == mixed[place]


def test_the_order_never_changes_between_releases():
    assert order(10, seed=0).tolist() == [8, 7, 0, 5, 2, 1, 9, 3, 4, 6]


def test_neighbours_are_scattered_over_the_whole_corpus():
    size = 10_000
    places = order(size, seed=1).astype(np.int64)
    counts = np.bincount(places[:1000] // 1000, minlength=10)
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, standard deviation 9.5
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05


def test_a_corpus_of_trillions_of_windows_needs_no_memory():
    size = 10**13 + 7
    places = permute(np.arange(4, dtype=np.uint64), size=size, key=combine(0, np.zeros(4, dtype=np.uint64)))
    assert len(set(places.tolist())) == 4
    assert places.max() < size
