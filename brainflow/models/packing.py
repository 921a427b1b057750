"""Index arithmetic of packed windows, on the host, where the lengths are known: no GPU synchronisation.

Everything here is numpy over window lengths; :func:`upload` sends the results to the device in one copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def upload(device: torch.device, **arrays: np.ndarray) -> dict[str, Tensor]:
    """Return the arrays as tensors on `device`, sent as one buffer (pinned and asynchronous for CUDA)."""
    offset, places = 0, {}
    for name, array in arrays.items():
        places[name] = offset
        offset += -(-array.nbytes // 16) * 16
    buffer = torch.empty(offset, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    for name, array in arrays.items():
        host[places[name] : places[name] + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
    sent = buffer.to(device, non_blocking=True)
    return {
        name: sent[places[name] : places[name] + array.nbytes]
        .view(torch.from_numpy(array[:0].copy()).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }
