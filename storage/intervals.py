"""Finding the interval that a number lies in, at a cost that hardly depends on how many there are."""

from __future__ import annotations

import numpy as np

_FEW = 2**14  # starts that fit the processor's cache


class Intervals:
    """Intervals given by their ascending starts.

    A binary search over a million starts waits a dozen times for memory. A table says for equal stretches of
    numbers, about as many as there are starts, which starts lie in each, so that it waits two or three times.

    Parameters
    ----------
    starts : int64 [intervals], ascending
    """

    def __init__(self, starts: np.ndarray) -> None:
        self._starts = starts
        self._table: np.ndarray | None = None
        if len(starts) > _FEW:
            self._first, last = int(starts[0]), int(starts[-1])
            self._shift = max(0, ((last - self._first) // len(starts)).bit_length() - 1)
            bounds = np.arange(self._first, last + (2 << self._shift), 1 << self._shift)
            self._table = starts.searchsorted(bounds).astype(np.int32)
            self._rounds = int(np.diff(self._table).max()).bit_length()

    def begun(self, numbers: np.ndarray) -> np.ndarray:
        """How many intervals begin at or before each number: int64 [numbers]."""
        starts, table = self._starts, self._table
        if table is None:
            return starts.searchsorted(numbers, "right")
        stretch = ((numbers - self._first) >> self._shift).clip(0, len(table) - 2)
        low, high = table[stretch].astype(np.int64), table[stretch + 1].astype(np.int64)
        for _ in range(self._rounds):
            middle = (low + high) >> 1
            begun = (starts.take(middle, mode="clip") <= numbers) & (middle < high)
            low, high = np.where(begun, middle + 1, low), np.where(begun, high, np.maximum(middle, low))
        return low
