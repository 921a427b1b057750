"""Index arithmetic of packed windows, on the host, where the lengths are known: no GPU synchronisation.

Everything here is numpy over window lengths; :func:`brainflow.upload.upload` sends the results to the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


def offsets(lengths: np.ndarray) -> Ints:
    """Return the offsets of windows of these lengths: int64 [windows + 1], 0 first.

    Examples
    --------
    >>> offsets(np.array([3, 2])).tolist()
    [0, 3, 5]
    """
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def window_of(lengths: np.ndarray) -> Ints:
    """Return the number of the window that each token belongs to: int64 [tokens].

    Examples
    --------
    >>> window_of(np.array([3, 2])).tolist()
    [0, 0, 0, 1, 1]
    """
    return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)


def positions(lengths: np.ndarray) -> Ints:
    """Return the place of each token in its window: int64 [tokens].

    Examples
    --------
    >>> positions(np.array([3, 2])).tolist()
    [0, 1, 2, 0, 1]
    """
    starts = offsets(lengths)
    return np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], lengths)
