"""Integer hashes that never change: numpy's generators may, and then every recorded loss and data order would."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of SplitMix64
MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def splitmix(state: np.ndarray) -> np.ndarray:
    """Mix 64-bit words, a bijection: the output step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16).

    Args:
        state: uint64 array, at least one-dimensional (numpy warns of overflow in scalars only).
    """
    word = state + GOLDEN
    word = (word ^ (word >> np.uint64(30))) * MULTIPLIER_1
    word = (word ^ (word >> np.uint64(27))) * MULTIPLIER_2
    return word ^ (word >> np.uint64(31))


def combine(*parts: int | np.ndarray) -> np.ndarray:
    """Hash several numbers into one word; arrays broadcast against each other, order matters."""
    word = np.zeros(1, dtype=np.uint64)
    for part in parts:
        number = np.uint64(part % 2**64) if isinstance(part, int) else part.astype(np.uint64)
        word = splitmix(word ^ number)
    return word
