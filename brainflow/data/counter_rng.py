"""Random numbers and permutations as pure functions of a counter, vectorised in NumPy.

A sampler built on them has no state: what element `i` of epoch `e` is can be asked at any time, on any
rank, at a cost that does not depend on how many elements there are.

The mixer is the 64-bit finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom
number generators"); the permutation is an alternating Feistel network over a rectangle a × b with cycle
walking (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

# 2⁶⁴ over the golden ratio, the increment of SplitMix64.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_ROUNDS = 4


def mix64(values: U64) -> U64:
    """Scramble an array of 64-bit integers, element by element (a bijection)."""
    x = values ^ (values >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def key(seed: int, *parts: ArrayLike) -> U64:
    """Fold a seed and integers (or integer arrays that broadcast) into one or more 64-bit keys."""
    folded = mix64(np.array([seed & _MASK], dtype=np.uint64) + _GOLDEN)
    for part in parts:
        # + 1: a part of 0 has to change the key, too.
        folded = mix64(folded ^ (np.atleast_1d(part).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return folded


def uniform(keys: U64, counter: ArrayLike) -> NDArray[np.float64]:
    """Return numbers in [0, 1), a pure function of (key, counter)."""
    bits = mix64(keys + (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    # 53 bits are all that a float64 holds: none is rounded up to 1.
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: ArrayLike, size: ArrayLike, keys: U64) -> NDArray[np.int64]:
    """Return where a pseudo-random permutation of `range(size)` sends `index`.

    Parameters
    ----------
    index
        Integers in [0, size).
    size
        Size of the permuted set, a number or one per element; below 2**52.
    keys
        One key per element or one for all; each key is a permutation of its own.

    Examples
    --------
    >>> sorted(permute(np.arange(10), 10, key(0)).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    value = np.atleast_1d(index).astype(np.uint64)
    size_ = np.broadcast_to(np.asarray(size).astype(np.uint64), value.shape)
    keys = np.broadcast_to(keys, value.shape)
    rows = np.maximum(np.ceil(np.sqrt(size_.astype(np.float64))), 1.0).astype(np.uint64)
    columns = (size_ + rows - np.uint64(1)) // rows
    out = _feistel(value, rows, columns, keys)
    # rows * columns exceeds `size` by less than a row, so hardly any element has to walk on.
    while (outside := np.flatnonzero(out >= size_)).size:
        out[outside] = _feistel(out[outside], rows[outside], columns[outside], keys[outside])
    return out.astype(np.int64)


def _feistel(value: U64, rows: U64, columns: U64, keys: U64) -> U64:
    """Permute [0, rows * columns): each half is shifted in turn by a hash of the other."""
    left = value // columns
    right = value - left * columns
    round_key = keys
    for _ in range(_ROUNDS):
        round_key = round_key + _GOLDEN
        # Halved, so that the sum with `left`, far below 2⁶³, does not wrap.
        left = (left + (mix64(right + round_key) >> np.uint64(1))) % rows
        round_key = round_key + _GOLDEN
        right = (right + (mix64(left + round_key) >> np.uint64(1))) % columns
    return left * columns + right
