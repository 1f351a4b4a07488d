"""A pseudo-random order of n things without a list of n entries, so that a run starts at once on any corpus."""

import math

import numpy as np

from data.hashing import splitmix

ROUNDS = 6  # four make a Feistel network pseudo-random (Luby and Rackoff, SIAM J. Comput. 17, 1988); two to spare


def permute(numbers: np.ndarray, *, size: int, key: np.ndarray) -> np.ndarray:
    """Send each of ``numbers`` to its place in a permutation of 0 … size-1; each key is another permutation.

    A Feistel network permutes the square of side ceil(√size); what falls outside 0 … size-1 is sent through it again
    until it falls inside, which keeps the map a bijection (Black and Rogaway, CT-RSA 2002: cycle walking). The square
    has at most 2√size + 1 cells too many, so that a second pass is rare.

    Example, size 5: the square has 9 cells. Were the network 0→3, 1→7, 2→0, 3→4, 4→1, 7→2, then 1→7→2 and the
    permutation is 0→3, 1→2, 2→0, 3→4, 4→1.

    Args:
        numbers: uint64 (N,), each below ``size``.
        size: how many things there are.
        key: uint64 (N,), the key of each number's permutation.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = splitmix(key + np.arange(ROUNDS, dtype=np.uint64)[:, None])  # (rounds, N)
    place = _network(numbers, side=side, keys=keys)
    outside = place >= np.uint64(size)
    while outside.any():
        place[outside] = _network(place[outside], side=side, keys=keys[:, outside])
        outside = place >= np.uint64(size)
    return place


def _network(numbers: np.ndarray, *, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass over the cells of the square: each round is undone by subtracting what it added."""
    left, right = np.divmod(numbers, side)
    for key in keys:
        left, right = right, (left + splitmix(right ^ key) % side) % side
    return left * side + right
