"""Rows of chunks that cannot be mapped, compressed or remote: each is fetched and decoded once a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

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
        self.row = lru_cache(_KEPT_ROWS)(self._row)

    def windows(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of each window, [length, *row_shape]."""
        chunk_rows, spans = self._grid.chunk_rows, self._grid.spans(starts, lengths)
        stored = self._fetch(chunks_of(spans))
        decoded = {chunk: self._chunk(data) for chunk, data in stored.items()}
        for span, start, length in zip(spans, starts.tolist(), lengths.tolist(), strict=True):
            rows = [decoded[chunk] for chunk in span]
            joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
            yield joined[start - span[0] * chunk_rows :][:length]

    def copy(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of each window behind one another into all of `out`."""
        np.concatenate(list(self.windows(starts, lengths)), out=out)

    def _row(self, row: int) -> np.ndarray:
        return next(self.windows(np.array([row]), np.array([1])))[0].copy()

    def _chunk(self, stored: np.ndarray) -> np.ndarray:
        """One chunk, [chunk_rows, *row_shape]."""
        grid = self._grid
        data = stored if grid.compression is None else self._decode(stored)
        return np.frombuffer(data, grid.dtype).reshape(grid.chunk_rows, *grid.row_shape)


def chunks_of(spans: list[range]) -> list[int]:
    """Numbers in any of some ranges, ascending, each once."""
    return sorted({chunk for span in spans for chunk in span})
