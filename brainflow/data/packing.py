"""The small arrays of a packed batch, made on the host from the sampler's windows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.data.windows import Windows


def packed_fields(windows: Windows) -> dict[str, NDArray[Any]]:
    """Return `times`, `cu_seqlens` and, where the sampler gives them, `labels` and `is_next`.

    Times are `i * t_r` in seconds, computed in float64 and rounded once to float32.
    """
    cu_seqlens = np.zeros(len(windows) + 1, dtype=np.int32)
    np.cumsum(windows.lengths, out=cu_seqlens[1:])
    position = np.arange(cu_seqlens[-1]) - cu_seqlens[:-1].repeat(windows.lengths)
    times = (position * windows.t_r.repeat(windows.lengths)).astype(np.float32)
    fields: dict[str, NDArray[Any]] = {"times": times, "cu_seqlens": cu_seqlens}
    if windows.labels is not None:
        fields["labels"] = np.ascontiguousarray(windows.labels, dtype=np.int64)
    if windows.is_next is not None:
        fields["is_next"] = np.ascontiguousarray(windows.is_next, dtype=np.float32)
    return fields


def packed_rows(windows: Windows) -> NDArray[np.int32]:
    """Return which row of the store each token of the packed batch is: [tokens]; rows must fit 32 bits."""
    ends = windows.lengths.cumsum(dtype=np.int64)
    rows = (windows.starts - ends + windows.lengths).repeat(windows.lengths)
    rows += np.arange(len(rows))
    return rows.astype(np.int32)
