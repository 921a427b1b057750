"""Rows of chunks that cannot be mapped, compressed or remote: each is fetched and decoded once a batch.

Zarr's own codec pipeline, and `zarrs` in its place, decode the same chunks; both were slower than
handing the chunks of a whole batch to the codec ourselves (`docs/format.md`), so no pipeline is asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numcodecs import Zstd

from .layout import Grid

_KEPT_ROWS = 4096


class DecodedRows:
    """Reads windows of an array chunk by chunk.

    Parameters
    ----------
    grid : layout of the array
    fetch : gives the stored bytes of chunks by number
    """

    def __init__(self, grid: Grid, fetch: Callable[[list[int]], Mapping[int, np.ndarray]]) -> None:
        self._grid = grid
        self._fetch = fetch
        self._decode = Zstd().decode
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self.row = lru_cache(_KEPT_ROWS)(self._row)

    def windows(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of each window, [length, *row_shape]."""
        chunk_rows, spans = self._grid.chunk_rows, self._grid.spans(starts, lengths)
        stored = self._fetch(chunks_of(spans))
        decoded = dict(zip(stored, self._decoded(list(stored.values())), strict=True))
        for span, start, length in zip(spans, starts.tolist(), lengths.tolist(), strict=True):
            rows = [decoded[chunk] for chunk in span]
            joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
            yield joined[start - span[0] * chunk_rows :][:length]

    def copy(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of each window behind one another into all of `out`."""
        np.concatenate(list(self.windows(starts, lengths)), out=out)

    def _row(self, row: int) -> np.ndarray:
        return next(self.windows(np.array([row]), np.array([1])))[0].copy()

    def _decoded(self, stored: list[np.ndarray]) -> list[np.ndarray]:
        """Chunks, [chunk_rows, *row_shape] each, decoded side by side: the codec lets go of Python's lock."""
        grid = self._grid
        data: list[Any] = stored
        if grid.compression is not None:
            if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
                self._pool = os.getpid(), ThreadPoolExecutor(len(os.sched_getaffinity(0)), "brainflow-decode")
            data = list(self._pool[1].map(self._decode, stored))
        return [np.frombuffer(one, grid.dtype).reshape(grid.chunk_rows, *grid.row_shape) for one in data]


def chunks_of(spans: list[range]) -> list[int]:
    """Numbers in any of some ranges, ascending, each once."""
    return sorted({chunk for span in spans for chunk in span})
